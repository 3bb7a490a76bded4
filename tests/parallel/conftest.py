"""Little optimised programs: most of the time of these tests would go into compiling them."""

from tests.training.conftest import quick_compilation as quick_compilation
