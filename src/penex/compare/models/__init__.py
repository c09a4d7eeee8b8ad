"""Networks: which one for which data, and the files of a trained one."""
