//! What the rank is doing now, for the heartbeat thread, and what it did, for the timeline.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hgct_comm::monotonic_ns;
use hgct_core::schedule::Action;
use hgct_core::timeline::ActionSpan;

/// Shared between the thread that trains and the one that beats.
#[derive(Debug, Default)]
pub struct Progress {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    step: u64,
    action: Option<Action>,
    since_ns: u64,
    completed: u64,
    spans: Vec<ActionSpan>,
}

/// One look at a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Step that it is in.
    pub step: u64,
    /// Action that it is in.
    pub action: Option<Action>,
    /// Since when, `CLOCK_MONOTONIC` nanoseconds.
    pub since_ns: u64,
    /// Actions completed so far.
    pub completed: u64,
}

impl Progress {
    /// What the rank is doing.
    pub fn look(&self) -> Look {
        let state = self.state();
        Look { step: state.step, action: state.action, since_ns: state.since_ns, completed: state.completed }
    }

    /// Something that is no action of the schedule begins: the wait for it counts from now.
    pub fn rest(&self) {
        let mut state = self.state();
        state.action = None;
        state.since_ns = monotonic_ns();
    }

    /// A sign that something moved which is no action of the schedule.
    pub fn alive(&self) {
        let mut state = self.state();
        state.since_ns = monotonic_ns();
        state.completed += 1;
    }

    pub(super) fn begin(&self, step: u64, action: Action) -> u64 {
        let now = monotonic_ns();
        let mut state = self.state();
        state.step = step;
        state.action = Some(action);
        state.since_ns = now;
        now
    }

    pub(super) fn end(&self, step: u64, action: Action, start_ns: u64) -> u64 {
        let end_ns = monotonic_ns();
        let mut state = self.state();
        state.action = None;
        state.since_ns = end_ns;
        state.completed += 1;
        state.spans.push(ActionSpan { step, action, start_ns, end_ns });
        end_ns
    }

    pub(super) fn take_spans(&self) -> Vec<ActionSpan> {
        std::mem::take(&mut self.state().spans)
    }

    /// A panic elsewhere leaves numbers that are still worth telling.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
