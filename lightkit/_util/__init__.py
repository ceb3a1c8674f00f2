"""Helpers that several parts of the package share."""

from lightkit._util.installation import check_package

# Nearly every module of lightkit imports a helper, so that the check comes before an error that nobody understands.
check_package()
