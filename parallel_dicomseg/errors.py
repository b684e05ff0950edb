"""The exceptions of the project: a broken slice is a value, these are the end of a run."""


class ParallelDicomSegError(Exception):
    """Base class: the run cannot start or go on, and the message says what to change."""


class ConfigurationError(ParallelDicomSegError):
    """An option, a configuration file or a combination of them is wrong."""


class LayoutError(ParallelDicomSegError):
    """The input directory, or a file that should be ours, is not laid out as it must be."""


class ConversionError(ParallelDicomSegError):
    """The conversion could not be finished; the reason is not one of the input slices."""


class ResumableError(ConversionError):
    """The run ended for a reason outside its input (disk, memory, workers, a signal); what was
    finished is kept, and the run can be resumed.
    """


class VerificationError(ParallelDicomSegError):
    """A finished file does not hold what it should."""
