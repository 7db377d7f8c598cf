//! Discrete-event simulation of a layout: every pipeline of it, in the order of its schedule, with
//! links that several transfers share and an exchange that begins while others still compute.
//!
//! A *unit* is one stage of one pipeline: the groups of devices that compute it together. What a unit
//! does takes what the problem says it takes; what it must wait for is found here. A transfer has the
//! link's time for its devices, and takes of its node's port what it would take alone with all the
//! node's devices, so that a node's groups share the port. Times are whole nanoseconds, and equal
//! times happen in the order in which they were found: the same input gives the same timeline.

use hgct_core::timeline::Timeline;

use crate::instance::{Group, Instance, Layout, check, check_groups};
use crate::{Error, Result};

mod exchange;
mod order;
mod place;
mod run;
#[cfg(test)]
mod tests;

/// Factors by which something may be slower: beyond them times are no longer whole nanoseconds.
pub const SLOW_FACTORS: std::ops::RangeInclusive<f64> = 1e-3..=1e6;

/// What if.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WhatIf {
    /// Devices that take a factor longer: a kind, a node (`KIND-3`) or a device (`KIND-3/0`).
    pub slow: Vec<(String, f64)>,
    /// Nodes that are gone: their pipelines stop, the others take over the samples.
    pub lose: Vec<String>,
}

/// What a simulation says of a layout.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulated {
    /// One step.
    pub step_ns: u64,
    /// From the first forward to the last backward of any unit.
    pub pipeline_ns: u64,
    /// Busy time of the busiest unit: the step is never shorter.
    pub roofline_ns: u64,
    /// Everything one after another: the step is never longer.
    pub serial_ns: u64,
    /// Transfers that waited for a port that others used, all together.
    pub contention_ns: u64,
    /// Pipelines that took part.
    pub num_pipelines: usize,
    /// Samples a step; with a node gone it may exceed the global batch by less than a micro-batch.
    pub num_samples: u64,
    /// The step, a row a group of devices (named by the first).
    pub timeline: Timeline,
}

/// More computations than this would be a timeline that nobody reads and a simulation that never ends.
const MOST: u64 = 4_000_000;

/// Simulates one step of a layout without faults.
pub fn simulate_layout(instance: &Instance, layout: &Layout, what_if: &WhatIf) -> Result<Simulated> {
    simulate_placed(instance, layout, None, what_if)
}

/// The same on devices that somebody gave it; without them on those of [`crate::instance::assign`].
pub fn simulate_placed(
    instance: &Instance,
    layout: &Layout,
    groups: Option<&[Group]>,
    what_if: &WhatIf,
) -> Result<Simulated> {
    let fault = check(instance, layout).into_iter().next();
    if let Some(fault) = fault.or_else(|| check_groups(instance, layout, groups?)) {
        return Err(Error::Layout { fault: fault.to_string() });
    }
    let computations = layout.computations();
    if computations > MOST {
        return Err(Error::Layout {
            fault: format!("{computations} computations are more than the {MOST} that are simulated"),
        });
    }
    let places = place::Places::new(instance, layout, groups, what_if)?;
    let mut machine = run::Machine::new(instance, layout, &places);
    machine.run();
    Ok(exchange::finish(instance, layout, &places, &machine))
}

/// Seconds as whole nanoseconds.
fn ns(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}
