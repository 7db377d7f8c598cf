//! What the rank is doing now, for the heartbeat thread, and what it did, for the timeline.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hgct_comm::monotonic_ns;
use hgct_core::schedule::{Action, Operation};
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
    waits: bool,
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
    /// What it is in without an action ends only when another rank has done something.
    pub waits: bool,
    /// Since when, `CLOCK_MONOTONIC` nanoseconds.
    pub since_ns: u64,
    /// Actions completed so far.
    pub completed: u64,
}

impl Progress {
    /// What the rank is doing.
    pub fn look(&self) -> Look {
        let state = self.state();
        let State { step, action, waits, since_ns, completed, .. } = *state;
        Look { step, action, waits, since_ns, completed }
    }

    /// Something that is no action of the schedule begins: the wait for it counts from now.
    pub fn rest(&self) {
        self.outside(false);
    }

    /// The same; `waits`: it ends only when another rank has done something.
    pub(super) fn outside(&self, waits: bool) {
        let mut state = self.state();
        state.action = None;
        state.waits = waits;
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

    /// Begins an action that was never done before, as far as others are told: its kernels compile,
    /// so no prediction holds for it.
    pub(super) fn begin_untold(&self, step: u64, action: Action) -> u64 {
        let now = self.begin(step, action);
        self.outside(action.operation == Operation::RecvActivation);
        now
    }

    pub(super) fn end(&self, step: u64, action: Action, start_ns: u64) -> u64 {
        let end_ns = monotonic_ns();
        let mut state = self.state();
        state.action = None;
        state.waits = false;
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
