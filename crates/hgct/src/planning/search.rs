//! The search with a clock beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use hgct_planner::instance::{Fault, Instance};
use hgct_planner::wide::{Effort, Found, find, find_and_prove};

/// Nodes of each search for reasons: many are made.
const QUICK_NODES: u64 = 100_000_000;

/// The part of a time limit after which the search ends, so that its gap can still be proven.
const SEARCH: f64 = 0.8;

/// Searches with the usual budget of nodes, which gives the same layout every time, or until the
/// time is over.
pub(super) fn search(instance: &Instance, time_limit: Option<f64>) -> Result<Found> {
    let Some(seconds) = time_limit else {
        return find(instance, None, &Effort::default()).map_err(|faults| unsound(&faults));
    };
    if !(seconds.is_finite() && seconds > 0.0 && seconds <= 1e6) {
        bail!("--time-limit is {seconds}, but must be more than 0 and at most 1000000 seconds");
    }
    let flags = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
    let timed = Arc::clone(&flags);
    // Left to itself when the search ends earlier: the process is about to end.
    std::thread::spawn(move || {
        for (flag, part) in timed.iter().zip([SEARCH, 1.0 - SEARCH]) {
            std::thread::sleep(Duration::from_secs_f64(seconds * part));
            flag.store(true, Ordering::Relaxed);
        }
    });
    let [stop, stop_proof] = &*flags;
    let effort = Effort { nodes: u64::MAX, stop: Some(stop) };
    find_and_prove(instance, None, &effort, Some(stop_proof)).map_err(|faults| unsound(&faults))
}

/// Iterations a second of the best layout that a short search finds.
pub(super) fn quick(instance: &Instance) -> Option<f64> {
    let found = find(instance, None, &Effort { nodes: QUICK_NODES, stop: None }).ok()?;
    found.best.map(|(_, priced)| 1.0 / priced.iteration_s)
}

/// What is wrong with a problem.
pub(super) fn unsound(faults: &[Fault]) -> anyhow::Error {
    let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
    anyhow!("the problem is not sound: {}", faults.join("; "))
}
