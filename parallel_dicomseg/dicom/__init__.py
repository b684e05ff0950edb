"""DICOM files: headers for the scan (`headers`), pixels for the conversion (`pixels`)."""
