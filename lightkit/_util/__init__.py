"""Helpers that several parts of the package share."""

from lightkit._util.installation import check_package

# Nearly every module of lightkit imports a helper: the check runs before a missing module causes an obscure error.
check_package()
