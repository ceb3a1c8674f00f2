"""Tables as samples: the columns of a table become the inputs and the targets of a model."""

from lightkit.data.tabular.encoding import TableEncoding
from lightkit.data.tabular.frames import frame_to_table
from lightkit.data.tabular.module import TableDataModule
from lightkit.data.tabular.records import records_to_table

__all__ = ["TableDataModule", "TableEncoding", "frame_to_table", "records_to_table"]
