//! Several failures arrive together: which one is the cause?
//!
//! When a worker dies, its peers' connections break, and their errors may come first. Failures are
//! collected for a moment; then the most telling one is named:
//!
//! 1. a process that ended by a signal, or an agent that is lost,
//! 2. a process that ended by itself without a word,
//! 3. a worker that says it failed and blames nobody,
//! 4. a worker that is silent or stalled,
//! 5. the worker at the end of the chain of blame that has blamed nobody itself.
//!
//! Among like ones the first. A process that ends after its worker said that it failed adds its log
//! to what was said and nothing else.

use hgct_core::ids::DeviceId;

use super::outcome::{Failure, WorkerRef};
use crate::message::Exit;

/// Failures since the first one.
#[derive(Debug)]
pub(super) struct Inquest {
    pub(super) opened_ns: u64,
    evidence: Vec<Evidence>,
}

#[derive(Debug)]
struct Evidence {
    failure: Failure,
    /// The worker that the failed one blames.
    blames: Option<WorkerRef>,
}

impl Inquest {
    pub(super) fn open(now_ns: u64) -> Self {
        Self { opened_ns: now_ns, evidence: Vec::new() }
    }

    /// Adds a failure.
    pub(super) fn add(&mut self, failure: Failure, blames: Option<WorkerRef>) {
        if let Failure::WorkerExited { worker, log_tail: last_lines, .. } = &failure {
            for known in &mut self.evidence {
                if let Failure::WorkerFailed { worker: failed, log_tail, .. } = &mut known.failure
                    && failed.device == worker.device
                {
                    log_tail.clone_from(last_lines);
                    return;
                }
            }
        }
        self.evidence.push(Evidence { failure, blames });
    }

    /// Whether no later evidence could be better.
    pub(super) fn is_decided(&self) -> bool {
        self.evidence.iter().any(|evidence| evidence.class() == 1)
    }

    /// The cause, and the other failures in order.
    pub(super) fn conclude(self) -> Option<(Failure, Vec<Failure>)> {
        let best = (0..self.evidence.len()).min_by_key(|index| self.evidence[*index].class())?;
        let (root, also_best) = match self.evidence[best].blames {
            Some(_) => (self.end_of_blame(best), true),
            None => (self.evidence[best].failure.clone(), false),
        };
        let others = self.evidence.into_iter().enumerate();
        let also = others.filter(|(index, _)| also_best || *index != best).map(|(_, e)| e.failure).collect();
        Some((root, also))
    }

    /// Follows blame from `start` to a worker that blames nobody; in a circle, the first word counts.
    fn end_of_blame(&self, start: usize) -> Failure {
        let mut seen: Vec<&DeviceId> = Vec::new();
        let mut at = &self.evidence[start];
        loop {
            let (Some(blamed), Some(by)) = (&at.blames, at.failure.worker()) else {
                return at.failure.clone();
            };
            if seen.contains(&&by.device) {
                return self.evidence[start].as_unreachable();
            }
            seen.push(&by.device);
            let next = self.evidence.iter().find(|other| {
                other.blames.is_some() && other.failure.worker().is_some_and(|w| w.device == blamed.device)
            });
            match next {
                Some(next) => at = next,
                None => return at.as_unreachable(),
            }
        }
    }
}

impl Evidence {
    fn as_unreachable(&self) -> Failure {
        match (&self.failure, &self.blames) {
            (Failure::WorkerFailed { worker: by, error, .. }, Some(worker)) => {
                let (worker, by, error) = (worker.clone(), by.clone(), error.clone());
                Failure::WorkerUnreachable { worker, by, error }
            }
            (failure, _) => failure.clone(),
        }
    }

    fn class(&self) -> u8 {
        match &self.failure {
            Failure::WorkerExited { exit: Exit::Signal { .. } | Exit::OutOfMemory { .. }, .. }
            | Failure::AgentLost { .. } => 1,
            Failure::WorkerExited { .. } => 2,
            Failure::WorkerSilent { .. } | Failure::WorkerStalled { .. } => 4,
            _ if self.blames.is_some() => 5,
            _ => 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use hgct_core::ids::NodeId;

    use super::*;
    use crate::coordinator::LostCause;

    fn worker(index: u32) -> WorkerRef {
        let device = DeviceId::new(format!("n/torch:{index}")).unwrap();
        WorkerRef { device, node: NodeId::new("n").unwrap(), rank: None }
    }

    fn failed(index: u32) -> Failure {
        Failure::WorkerFailed { worker: worker(index), error: "reset".into(), log_tail: String::new() }
    }

    fn exited(index: u32, exit: Exit) -> Failure {
        Failure::WorkerExited { worker: worker(index), exit, log_tail: "tail".into() }
    }

    fn root(evidence: Vec<(Failure, Option<u32>)>) -> Failure {
        let mut inquest = Inquest::open(0);
        for (failure, blames) in evidence {
            inquest.add(failure, blames.map(worker));
        }
        inquest.conclude().unwrap().0
    }

    #[test]
    fn a_signal_beats_the_errors_that_it_caused() {
        let killed = exited(1, Exit::Signal { signal: 9 });
        assert_eq!(root(vec![(failed(0), Some(1)), (failed(2), Some(0)), (killed.clone(), None)]), killed);
    }

    #[test]
    fn an_exit_after_a_word_only_adds_its_log() {
        let Failure::WorkerFailed { worker: w, log_tail, .. } =
            root(vec![(failed(0), None), (exited(0, Exit::Code { code: 1 }), None)])
        else {
            panic!("not the word")
        };
        assert_eq!((w, log_tail.as_str()), (worker(0), "tail"));
    }

    #[test]
    fn blame_is_followed_to_the_one_that_is_quiet() {
        let Failure::WorkerUnreachable { worker: w, by, .. } =
            root(vec![(failed(2), Some(1)), (failed(1), Some(0)), (failed(3), Some(2))])
        else {
            panic!("not blamed")
        };
        assert_eq!((w, by), (worker(0), worker(1)));
    }

    #[test]
    fn in_a_circle_of_blame_the_first_word_counts() {
        let Failure::WorkerUnreachable { worker: w, by, .. } =
            root(vec![(failed(2), Some(0)), (failed(0), Some(1)), (failed(1), Some(0))])
        else {
            panic!("not blamed")
        };
        assert_eq!((w, by), (worker(0), worker(2)));
    }

    #[test]
    fn a_lost_agent_beats_blame_for_its_workers() {
        let lost = Failure::AgentLost {
            node: NodeId::new("n").unwrap(),
            cause: LostCause::Closed,
            workers: vec![worker(1)],
        };
        assert_eq!(root(vec![(failed(0), Some(1)), (lost.clone(), None)]), lost);
    }
}
