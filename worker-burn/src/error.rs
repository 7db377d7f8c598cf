//! What fails, told as every engine tells it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use hgct_worker::{Error, Result, panic_message};

/// The engine's name.
pub(crate) const NAME: &str = "burn";

/// Runs `body`; a panic inside of Burn or wgpu, which is how both tell of most failures, becomes an
/// error like any other.
pub(crate) fn guarded<T>(operation: &'static str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|panic| Err(failed(operation, panic_message(panic.as_ref()))))
}

pub(crate) fn failed(operation: &'static str, message: impl AsRef<str>) -> Error {
    Error::Engine { engine: NAME.into(), operation, message: essence(message.as_ref()) }
}

/// Burn's errors without backtraces and headings, in one line.
fn essence(text: &str) -> String {
    const NOISE: [&str; 5] = ["", "Caused by:", "Backtrace:", "Asked at:", "No backtrace available"];
    let lines = text.lines().map(str::trim).filter(|line| !NOISE.contains(line));
    lines.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_in_one_line() {
        let error = guarded::<()>("forward", || panic!("wgpu error: lost\n\nCaused by:\n  the driver\n"));
        assert_eq!(
            error.unwrap_err().to_string(),
            "engine burn: forward failed: wgpu error: lost; the driver"
        );
    }
}
