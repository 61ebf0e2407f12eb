"""One file is one family of experiments; `get_config(arg)` returns a locked ConfigDict."""
