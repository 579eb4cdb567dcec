"""What creates, renames or deletes files, alone: after a failure or a crash there is the old state or the new.

Everything is built beside its destination under a hidden name, synced to the disk, and put in place by one rename. Two
kinds of failure are told apart: E-IO-WRITE (nothing was committed) and E-IO-SYNC (the new state is in place, but the
system did not confirm that it would survive a power loss). `system` the calls themselves, `checks` before any work,
`files` and `folders` that appear whole, `work` that a later run can go on with, and locks; `waiting` locks that are
waited for.
"""

from lrconvert.io.durable.checks import StrPath, check_output, check_own, require_space
from lrconvert.io.durable.files import (
    File,
    Writer,
    appended,
    atomic_file,
    check_changeable,
    delete_leftover,
    discard,
    give_to_owner,
    install,
    overwrite_bytes,
    sync_folder,
)
from lrconvert.io.durable.folders import StagedDirectory, atomic_directory, make_folder, remove_empty
from lrconvert.io.durable.system import Buffer
from lrconvert.io.durable.waiting import FileLock, file_lock
from lrconvert.io.durable.work import (
    CONTENT,
    LINES_NAME,
    PLAN_NAME,
    Work,
    clean_up,
    clean_up_files,
    end_work,
    leftovers,
    locked,
    open_work,
    partial_path,
    work_directory,
    work_root,
)

__all__ = [
    "CONTENT",
    "LINES_NAME",
    "PLAN_NAME",
    "Buffer",
    "File",
    "FileLock",
    "StagedDirectory",
    "StrPath",
    "Work",
    "Writer",
    "appended",
    "atomic_directory",
    "atomic_file",
    "check_changeable",
    "check_output",
    "check_own",
    "clean_up",
    "clean_up_files",
    "delete_leftover",
    "discard",
    "end_work",
    "file_lock",
    "give_to_owner",
    "install",
    "leftovers",
    "locked",
    "make_folder",
    "open_work",
    "overwrite_bytes",
    "partial_path",
    "remove_empty",
    "require_space",
    "sync_folder",
    "work_directory",
    "work_root",
]
