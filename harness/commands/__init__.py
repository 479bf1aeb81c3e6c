"""The commands of ``mpt-conform``: one short function each; imports wait until they are needed."""
