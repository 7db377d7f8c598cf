//! The conformance suite: what an engine on a device must do before that device may join.
//!
//! Every check plays the same calls on the engine and on the plain f64 [`ReferenceEngine`] and
//! compares all that comes out. Shapes are small, and most checks share one, so that an engine
//! that compiles does so a few times only. A check that fails, panics or takes too long is a row
//! with the reason; the others still run.
//!
//! The suite can end an engine's wait, not a call that never returns: the agent's deadline for the
//! whole worker does that.
//!
//! [`ReferenceEngine`]: crate::reference::ReferenceEngine

mod case;
mod checks;
mod compare;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use hgct_core::check::{CheckReport, CheckRow, Verdict};
use hgct_core::ids::{DeviceId, Kind};

use crate::engine::Engine;
use crate::panic_message;
use checks::{CHECKS, Check};

/// What a check found: a row's verdict, error, tolerance and message.
#[derive(Debug)]
struct Finding {
    verdict: Verdict,
    error: Option<f64>,
    tolerance: Option<f64>,
    message: String,
}

/// Why a check could not be finished.
type Failure = String;

impl Finding {
    /// Passes where the error is at most the tolerance; an error that is no number fails.
    fn measured(error: f64, tolerance: f64, message: String) -> Self {
        let verdict = if error <= tolerance { Verdict::Pass } else { Verdict::Fail };
        Self { verdict, error: Some(error), tolerance: Some(tolerance), message }
    }

    fn pass(message: String) -> Self {
        Self { verdict: Verdict::Pass, error: None, tolerance: None, message }
    }

    fn fail(message: String) -> Self {
        Self { verdict: Verdict::Fail, error: None, tolerance: None, message }
    }

    fn skipped(message: &str) -> Self {
        Self { verdict: Verdict::Skipped, error: None, tolerance: None, message: message.into() }
    }
}

/// Names of all checks, in order.
pub fn names() -> Vec<&'static str> {
    CHECKS.iter().map(|check| check.name).collect()
}

/// Runs all checks within `budget`. A check may take half of what is left, the last all of it; those
/// that the budget does not reach fail.
pub fn run(engine: &mut dyn Engine, device: DeviceId, kind: Kind, budget: Duration) -> CheckReport {
    run_named(engine, device, kind, budget, &names())
}

/// Like [`run`], but only the checks of these names.
pub fn run_named(
    engine: &mut dyn Engine,
    device: DeviceId,
    kind: Kind,
    budget: Duration,
    names: &[&str],
) -> CheckReport {
    let end = Instant::now() + budget;
    let chosen: Vec<&Check> = CHECKS.iter().filter(|check| names.contains(&check.name)).collect();
    let last = chosen.len().saturating_sub(1);
    let checks: Vec<CheckRow> = chosen
        .iter()
        .enumerate()
        .map(|(at, check)| row(engine, check, end, budget, if at == last { 1 } else { 2 }))
        .collect();
    let failed = checks.iter().any(|row| row.verdict == Verdict::Fail);
    CheckReport { device, kind, verdict: if failed { Verdict::Fail } else { Verdict::Pass }, checks }
}

/// One check, which may take `1 / part` of what is left until `end`.
fn row(engine: &mut dyn Engine, check: &Check, end: Instant, budget: Duration, part: u32) -> CheckRow {
    let start = Instant::now();
    let left = end.saturating_duration_since(start);
    let finding = if left.is_zero() {
        Finding::fail(format!("not reached within {:.0} s", budget.as_secs_f64()))
    } else {
        // Whatever state a panic leaves behind, the next check loads anew.
        match catch_unwind(AssertUnwindSafe(|| (check.run)(engine, start + left / part))) {
            Ok(Ok(finding)) => finding,
            Ok(Err(failure)) => Finding::fail(failure),
            Err(panic) => Finding::fail(format!("panicked: {}", panic_message(panic.as_ref()))),
        }
    };
    let Finding { verdict, error, tolerance, message } = finding;
    // An infinite error says no more than its message, and JSON has no word for it.
    let error = error.filter(|error| error.is_finite());
    CheckRow {
        name: check.name.into(),
        verdict,
        error,
        tolerance,
        seconds: start.elapsed().as_secs_f64(),
        message,
    }
}

#[cfg(test)]
mod tests;
