//! What a sender holds while its message is on the way.

use std::sync::{Arc, Condvar, Mutex};

use crate::sync::{locked, wait_until};
use crate::time::Deadline;

/// Moments of one transfer, in nanoseconds of [`monotonic_ns`](crate::monotonic_ns).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// When it was handed over. For an arrival from the same host: when the sender did.
    pub queued_ns: u64,
    /// When its first byte moved.
    pub start_ns: u64,
    /// When its last byte had moved.
    pub end_ns: u64,
}

/// How far a send is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendState {
    /// Queued or under way.
    Pending,
    /// Handed to the wire; its memory is free again.
    Sent(Times),
    /// Dropped, because the communicator failed, was aborted, or the peer is gone.
    Dropped,
}

/// A send that was accepted. It may be dropped freely: the message leaves all the same.
#[derive(Debug, Clone)]
pub struct SendTicket {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<SendState>,
    changed: Condvar,
}

impl SendTicket {
    pub(crate) fn new() -> Self {
        let shared = Shared { state: Mutex::new(SendState::Pending), changed: Condvar::new() };
        Self { shared: Arc::new(shared) }
    }

    /// How far the send is.
    pub fn state(&self) -> SendState {
        *locked(&self.shared.state)
    }

    /// Waits until the message has left or was dropped; [`SendState::Pending`] at the deadline.
    pub fn wait(&self, deadline: Deadline) -> SendState {
        let mut state = locked(&self.shared.state);
        while *state == SendState::Pending && !deadline.has_passed() {
            state = wait_until(&self.shared.changed, state, deadline);
        }
        *state
    }

    pub(crate) fn finish(&self, state: SendState) {
        *locked(&self.shared.state) = state;
        self.shared.changed.notify_all();
    }
}
