"""From volumes and spreadsheets to class folders."""
