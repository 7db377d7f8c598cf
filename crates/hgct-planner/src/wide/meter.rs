//! How long a search may go on.

use std::sync::atomic::{AtomicBool, Ordering};

/// What a search may spend. The same nodes give the same answer, byte for byte, unless the stop flag
/// ends it.
#[derive(Debug, Clone, Copy)]
pub struct Effort<'a> {
    /// Partial pipelines and states that are looked at.
    pub nodes: u64,
    /// Set by the caller, who owns the clock, to end the search with the best layout so far.
    pub stop: Option<&'a AtomicBool>,
}

impl Default for Effort<'_> {
    /// Below a second for a thousand devices.
    fn default() -> Self {
        Self { nodes: 400_000_000, stop: None }
    }
}

/// Counts nodes down.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    left: u64,
    spent: u64,
    stop: Option<&'a AtomicBool>,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(effort: &Effort<'a>) -> Self {
        Self { left: effort.nodes, spent: 0, stop: effort.stop }
    }

    #[cfg(test)]
    pub(crate) fn endless() -> Self {
        Self { left: u64::MAX, spent: 0, stop: None }
    }

    /// Spends nodes; `None` when there are none left, or the caller says stop.
    pub(crate) fn spend(&mut self, nodes: u64) -> Option<()> {
        if self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return None;
        }
        self.left = self.left.checked_sub(nodes)?;
        self.spent += nodes;
        Some(())
    }

    /// Nodes left.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// The caller's flag.
    pub(crate) fn stop(&self) -> Option<&'a AtomicBool> {
        self.stop
    }

    /// Nodes spent so far.
    pub(crate) fn spent(&self) -> u64 {
        self.spent
    }
}
