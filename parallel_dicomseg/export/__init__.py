"""Files for other programs out of a converted file: NIfTI and the raw layout of nnU-Net."""

from parallel_dicomseg.export.folder import ExportedCase, ExportReport
from parallel_dicomseg.export.nifti import export_nifti
from parallel_dicomseg.export.nnunet import export_nnunet
from parallel_dicomseg.export.volumes import Note, NoteKind

__all__ = [
    "ExportReport",
    "ExportedCase",
    "Note",
    "NoteKind",
    "export_nifti",
    "export_nnunet",
]
