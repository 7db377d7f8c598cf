//! Standard output, to which every command prints its answer.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};

/// Prints an answer. Who has closed the pipe has enough, as with `hgct report latest | head`: that is
/// no error.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}
