"""Names of the files and folders that systems and programs leave in a user's folders."""

from __future__ import annotations

# In small letters.
_LITTER = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "sthumbs.db", "desktop.ini", "iconcache.db", "picasa.ini"),
        *(".ds_store", ".localized", ".directory", "icon\r", "__macosx", "$recycle.bin", "system volume information"),
        *("lost+found", "@eadir", "#recycle"),
    )
)


def is_litter(name: str) -> bool:
    """Returns True if ``name`` is that of a file or folder that no user has made, such as Thumbs.db or ``__MACOSX``.

    The files that macOS keeps beside others (``._x.txt``), the locks of office programs (``~$x.doc``), and the copies
    that editors make of a file (``x.txt~``, ``#x.txt#``) count too.
    """
    is_copy = name.endswith("~") or (len(name) > 2 and name[0] == name[-1] == "#")
    return name.lower() in _LITTER or name.startswith(("._", "~$", ".~lock.")) or is_copy
