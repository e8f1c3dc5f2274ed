"""Print what each of rbee's processes holds in memory."""
