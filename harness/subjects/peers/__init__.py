"""Other people's MPT, each through its own public way in; one small file each."""
