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
//! | [`answer`] | the answer to a large problem as a document, and why it is the answer |
//! | [`cost`] | time and memory of stages, from the profile |
//! | [`mod@simulate`] | a plan's step as a timeline |
//! | [`bound`] | what no plan can beat |
//! | [`estimate`] | such a problem from public figures of cards, with an interval, or from a profile |
//! | [`instance`] | problems of thousands of devices as plain numbers, their answers and their price |
//! | [`wide`] | the search over these: layouts, bound and gap, replanning |
//! | [`explain`] | why this plan: a table for people, serde for programs |
//! | [`scale`] | a layout's step as a timeline, for thousands of devices, and what-ifs |
//! | [`mod@export`] | a plan in the words of other programs |
//! | [`tables`] | layer times, links and measured plans that others have published, as files |
//! | [`truth`] | our price of a plan that somebody has really run, and the published one |
//! | [`words`] | figures as people read them |
//! | [`mod@lint`] | what is wrong with any plan, independent of the search |

pub mod answer;
pub mod bound;
mod choices;
pub mod cost;
mod error;
pub mod estimate;
mod evaluate;
mod exchange;
mod executable;
pub mod explain;
pub mod export;
mod fleet;
pub mod instance;
pub mod lint;
mod plan;
mod planned;
mod program;
pub mod scale;
mod search;
pub mod simulate;
pub mod tables;
#[cfg(test)]
mod tests;
pub mod truth;
pub mod wide;
pub mod words;

pub use error::{Error, Result};
pub use executable::{MeasuredInput, executable};
pub use explain::Explanation;
pub use lint::{Finding, Severity, lint};
pub use plan::{PlanInput, plan};
pub use planned::Planned;
pub use search::Budget;
pub use simulate::{Pricing, Simulation, simulate, simulate_free_communication, simulate_priced};
