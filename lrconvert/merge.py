class MergeReport: pass
