//! The one clock of this crate, and deadlines on it.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`: one clock for all processes of a host, so that the records of
/// workers side by side can be laid over each other.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The moment at which a wait gives up. Every call that may wait takes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline {
    at_ns: u64,
}

impl Deadline {
    /// A deadline that lies `wait` from now.
    pub fn after(wait: Duration) -> Self {
        let wait_ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        Self { at_ns: monotonic_ns().saturating_add(wait_ns) }
    }

    /// A deadline at `at_ns` of [`monotonic_ns`].
    pub fn at_ns(at_ns: u64) -> Self {
        Self { at_ns }
    }

    /// The deadline in nanoseconds of [`monotonic_ns`].
    pub fn ns(self) -> u64 {
        self.at_ns
    }

    /// Time left; zero once it has passed.
    pub fn remaining(self) -> Duration {
        Duration::from_nanos(self.at_ns.saturating_sub(monotonic_ns()))
    }

    /// Whether the moment has come.
    pub fn has_passed(self) -> bool {
        monotonic_ns() >= self.at_ns
    }
}

/// A duration in the form the kernel takes.
pub(crate) fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(wait.subsec_nanos()),
    }
}
