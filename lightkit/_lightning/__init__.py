"""The private API of Lightning that lightkit touches, under plain names.

No other package of lightkit names an attribute, a function or a class of Lightning that begins with an underscore.
`lightkit._lightning.names` lists them all, with the release of Lightning that they were checked with.
"""
