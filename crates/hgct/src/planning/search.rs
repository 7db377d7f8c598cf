//! The search with a clock beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use hgct_planner::answer::TimeOver;
use hgct_planner::instance::{Fault, Instance};
use hgct_planner::wide::{Effort, Found, find, find_and_prove};

/// Nodes of each search for reasons: many are made.
const QUICK_NODES: u64 = 100_000_000;

/// The parts of a time limit after which the search ends, its gap is proven, and nothing more is
/// searched for.
const PARTS: [f64; 3] = [0.8, 1.0, 1.0];
/// The same where there is more to search for than the answer.
const PARTS_WITH_MORE: [f64; 3] = [0.4, 0.5, 1.0];

/// What an early end leaves out of a search for iterations a second alone.
static NO_PROOF: AtomicBool = AtomicBool::new(true);

/// Searches within a time limit, or with budgets of nodes, which give the same layouts every time.
pub(super) struct Clock {
    /// Raised at the ends of the parts; absent without a limit.
    flags: Option<Arc<[AtomicBool; 3]>>,
}

impl Clock {
    /// Starts; `more`: other problems are to be searched within the limit, too.
    pub(super) fn new(time_limit: Option<f64>, more: bool) -> Result<Self> {
        let Some(seconds) = time_limit else { return Ok(Self { flags: None }) };
        if !(seconds.is_finite() && seconds > 0.0 && seconds <= 1e6) {
            bail!("--time-limit is {seconds}, but must be more than 0 and at most 1000000 seconds");
        }
        let flags: Arc<[AtomicBool; 3]> = Arc::default();
        let (timed, started) = (Arc::clone(&flags), Instant::now());
        // Left to itself when the search ends earlier: the process is about to end.
        std::thread::spawn(move || {
            for (flag, part) in timed.iter().zip(if more { PARTS_WITH_MORE } else { PARTS }) {
                let end = Duration::from_secs_f64(seconds * part);
                std::thread::sleep(end.saturating_sub(started.elapsed()));
                flag.store(true, Ordering::Relaxed);
            }
        });
        Ok(Self { flags: Some(flags) })
    }

    /// Searches for the answer.
    pub(super) fn search(&self, instance: &Instance) -> Result<Found> {
        let found = match self.flags.as_deref() {
            None => find(instance, None, &Effort::default()),
            Some([stop, stop_proof, _]) => {
                let effort = Effort { nodes: u64::MAX, stop: Some(stop) };
                find_and_prove(instance, None, &effort, Some(stop_proof))
            }
        };
        found.map_err(|faults| unsound(&faults))
    }

    /// Iterations a second of the best layout that a short search finds.
    pub(super) fn quick(&self, instance: &Instance) -> Result<Option<f64>, TimeOver> {
        let stop = self.flags.as_deref().map(|[.., stop]| stop);
        let is_over = || stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
        if is_over() {
            return Err(TimeOver);
        }
        let found = find_and_prove(instance, None, &Effort { nodes: QUICK_NODES, stop }, Some(&NO_PROOF));
        match found {
            // What was found so far says nothing of what there is.
            Ok(found) if !found.finished && is_over() => Err(TimeOver),
            Ok(found) => Ok(found.best.map(|(_, priced)| 1.0 / priced.iteration_s)),
            Err(_) => Ok(None),
        }
    }
}

/// What is wrong with a problem.
pub(super) fn unsound(faults: &[Fault]) -> anyhow::Error {
    let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
    anyhow!("the problem is not sound: {}", faults.join("; "))
}
