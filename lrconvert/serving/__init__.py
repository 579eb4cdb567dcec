"""Compact files by name, for servers: `settings` from the environment, `store` where the files are, `library` what a
server asks, `base_check`; `vllm` and `dynamo` are the plugins, loaded by those programs alone."""
