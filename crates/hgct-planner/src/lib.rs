//! Cost model, discrete-event simulation, search, bound and linter of plans. Pure: a search takes
//! its budget and stop flag from the caller, who owns the clock and the threads.
//!
//! ```text
//! JobSpec, ModelSpec, ClusterSpec, Profile ──► plan ──► Planned { plan, explanation, timeline }
//!                                     cost ─► choices ─► search ─► simulate
//! ```
//!
//! | Module | Holds |
//! | --- | --- |
//! | [`cost`] | time and memory of stages, from the profile |
//! | [`mod@simulate`] | a plan's step as a timeline |
//! | [`bound`] | what no plan can beat |
//! | [`estimate`] | such a problem from public figures of cards, with an interval, or from a profile |
//! | [`instance`] | problems of thousands of devices as plain numbers, their answers and their price |
//! | [`explain`] | why this plan: a table for people, serde for programs |
//! | [`mod@lint`] | what is wrong with any plan, independent of the search |

pub mod bound;
mod choices;
pub mod cost;
mod error;
pub mod estimate;
mod evaluate;
mod exchange;
pub mod explain;
mod fleet;
pub mod instance;
pub mod lint;
mod plan;
mod program;
mod search;
pub mod simulate;
#[cfg(test)]
mod tests;

pub use error::{Error, Result};
pub use explain::Explanation;
pub use lint::{Finding, Severity, lint};
pub use plan::{Budget, PlanInput, Planned, plan};
pub use simulate::{Pricing, Simulation, simulate, simulate_free_communication, simulate_priced};
