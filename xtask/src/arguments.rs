//! What stands behind a task's name on the command line.

use anyhow::bail;
use pico_args::Arguments;

/// Refuses the arguments that no option has taken.
pub(crate) fn finish(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.finish().first() {
        None => Ok(()),
        Some(other) => bail!(
            "`{}` is not understood; `--help` lists the options",
            other.to_string_lossy()
        ),
    }
}
