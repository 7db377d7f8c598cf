//! How a run can end, with everything that a person needs to know about it.

use std::fmt;

use hgct_core::ids::{DeviceId, Generation, NodeId, Rank};
use serde::{Deserialize, Serialize};

use crate::detector::Stall;
use crate::message::Exit;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Outcome {
    /// The driver had all it wanted.
    Completed,
    /// A stop was asked for and carried out.
    Stopped {
        /// Steps trained, if any training ran.
        step: Option<u64>,
    },
    /// A second stop, or the driver itself, ended it at once.
    Aborted {
        /// Why.
        reason: String,
    },
    /// Something failed.
    Failed {
        /// The root cause.
        failure: Box<Failure>,
        /// Other failures seen until the verdict, in order.
        also: Vec<Failure>,
        /// Steps committed in this session, if any training ran.
        committed: Option<u64>,
    },
}

/// A worker, as an error names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRef {
    /// Its device.
    pub device: DeviceId,
    /// Its node.
    pub node: NodeId,
    /// Its rank and generation, if it is part of a loaded plan.
    pub rank: Option<(Rank, Generation)>,
}

/// Why an agent is lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum LostCause {
    /// Its connection was closed: the agent's process ended.
    Closed,
    /// Its connection failed.
    Connection {
        /// What the operating system said.
        message: String,
    },
    /// It said what it may not say.
    Protocol {
        /// What.
        message: String,
    },
    /// It was silent.
    Silent {
        /// For so long.
        silent_ns: u64,
        /// Where so much is allowed.
        allowed_ns: u64,
    },
    /// It said that it leaves.
    Left {
        /// Why.
        reason: String,
    },
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Failure {
    /// Too few agents came in time.
    TooFewAgents {
        /// Agents wanted.
        wanted: usize,
        /// Nodes that came.
        joined: Vec<NodeId>,
        /// Time waited.
        waited_ns: u64,
    },
    /// An agent is lost, and its workers with it.
    AgentLost {
        /// Its node.
        node: NodeId,
        /// Why.
        cause: LostCause,
        /// Its workers.
        workers: Vec<WorkerRef>,
    },
    /// A worker's process ended by itself or by a signal.
    WorkerExited {
        /// Which.
        worker: WorkerRef,
        /// How.
        exit: Exit,
        /// Last lines of its log.
        log_tail: String,
    },
    /// A worker said that it cannot go on.
    WorkerFailed {
        /// Which.
        worker: WorkerRef,
        /// Its chain of causes.
        error: String,
        /// Last lines of its log, if its process has ended since.
        log_tail: String,
    },
    /// A worker's process is there, but silent.
    WorkerSilent {
        /// Which.
        worker: WorkerRef,
        /// Silence.
        silent_ns: u64,
        /// Silence allowed.
        allowed_ns: u64,
    },
    /// A worker completes nothing.
    WorkerStalled {
        /// Which.
        worker: WorkerRef,
        /// Where it stands.
        stall: Stall,
    },
    /// Another worker cannot reach this one, which itself says nothing of a failure.
    WorkerUnreachable {
        /// Which.
        worker: WorkerRef,
        /// Who says so.
        by: WorkerRef,
        /// The other's chain of causes.
        error: String,
    },
    /// Workers did not answer in time.
    Deadline {
        /// To what.
        what: String,
        /// Who is missing.
        workers: Vec<WorkerRef>,
        /// Time allowed.
        allowed_ns: u64,
    },
    /// Ranks computed different losses for the same step.
    Disagreement {
        /// The step.
        step: u64,
        /// One of them and what it reports.
        first: (WorkerRef, String),
        /// One that reports something else.
        second: (WorkerRef, String),
    },
    /// A worker reported what cannot come now.
    OutOfOrder {
        /// Which.
        worker: WorkerRef,
        /// What it reported.
        found: String,
        /// What could come.
        expected: String,
    },
    /// Loss or gradient norm was not finite too often in a row.
    NotFinite {
        /// The last such step.
        step: u64,
        /// How many in a row.
        in_a_row: u32,
    },
}

impl Failure {
    /// The worker that it is about.
    pub fn worker(&self) -> Option<&WorkerRef> {
        match self {
            Self::WorkerExited { worker, .. }
            | Self::WorkerFailed { worker, .. }
            | Self::WorkerSilent { worker, .. }
            | Self::WorkerStalled { worker, .. }
            | Self::WorkerUnreachable { worker, .. }
            | Self::OutOfOrder { worker, .. } => Some(worker),
            Self::Deadline { workers, .. } => workers.first(),
            Self::TooFewAgents { .. }
            | Self::AgentLost { .. }
            | Self::Disagreement { .. }
            | Self::NotFinite { .. } => None,
        }
    }

    /// The node that it is about.
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::AgentLost { node, .. } => Some(node),
            other => other.worker().map(|worker| &worker.node),
        }
    }
}

impl fmt::Display for WorkerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker {} on node {}", self.device, self.node)?;
        match self.rank {
            Some((rank, generation)) => write!(f, " ({rank}, {generation})"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for LostCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("its connection was closed: the agent's process ended"),
            Self::Connection { message } => write!(f, "its connection failed: {message}"),
            Self::Protocol { message } => write!(f, "it broke the protocol: {message}"),
            Self::Silent { silent_ns, allowed_ns } => {
                write!(f, "it was silent for {}, {} are allowed", seconds(*silent_ns), seconds(*allowed_ns))
            }
            Self::Left { reason } => write!(f, "it left: {reason}"),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooFewAgents { wanted, joined, waited_ns } => {
                let names: Vec<&str> = joined.iter().map(NodeId::as_str).collect();
                write!(
                    f,
                    "{} of {wanted} agents joined within {} ({}): start `hgct agent` on the other nodes with this run's token file",
                    joined.len(),
                    seconds(*waited_ns),
                    if names.is_empty() { "none".into() } else { names.join(", ") }
                )
            }
            Self::AgentLost { node, cause, workers } => {
                write!(f, "the agent of node {node} is lost: {cause}")?;
                for worker in workers {
                    write!(f, "; with it {worker}")?;
                }
                Ok(())
            }
            Self::WorkerExited { worker, exit, log_tail } => {
                write!(f, "{worker} died: {exit}")?;
                if matches!(exit, Exit::Signal { signal: 9 }) {
                    f.write_str(" (if nobody sent it: the kernel was out of memory)")?;
                }
                tail(f, log_tail)
            }
            Self::WorkerFailed { worker, error, log_tail } => {
                write!(f, "{worker} failed: {error}")?;
                tail(f, log_tail)
            }
            Self::WorkerSilent { worker, silent_ns, allowed_ns } => write!(
                f,
                "{worker} is stalled: no beat for {}, {} are allowed; its process is there but does not run",
                seconds(*silent_ns),
                seconds(*allowed_ns)
            ),
            Self::WorkerStalled { worker, stall } => {
                write!(f, "{worker} is stalled: in step {} it is ", stall.step)?;
                match stall.action {
                    Some(action) => write!(f, "in action {action}")?,
                    None => f.write_str("between actions")?,
                }
                write!(f, " for {}, {} are allowed", seconds(stall.since_ns), seconds(stall.allowed_ns))?;
                f.write_str(if stall.warming { " while it warms up" } else { "" })
            }
            Self::WorkerUnreachable { worker, by, error } => {
                write!(f, "{worker} cannot be reached by {by}: {error}")
            }
            Self::Deadline { what, workers, allowed_ns } => {
                let names: Vec<String> = workers.iter().map(ToString::to_string).collect();
                write!(f, "no answer to {what} within {} from {}", seconds(*allowed_ns), names.join(", "))
            }
            Self::Disagreement { step, first, second } => write!(
                f,
                "ranks disagree on step {step}: {} reports {}, {} reports {}",
                first.0, first.1, second.0, second.1
            ),
            Self::OutOfOrder { worker, found, expected } => {
                write!(f, "{worker} reported {found} where {expected} comes next")
            }
            Self::NotFinite { step, in_a_row } => write!(
                f,
                "loss or gradient norm was not finite in {in_a_row} steps in a row, the last was step {step}; \
                 the last good checkpoint is kept: lower recipe.learning_rate or lengthen recipe.warmup_steps"
            ),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => f.write_str("completed"),
            Self::Stopped { step: Some(step) } => write!(f, "stopped after step {step}"),
            Self::Stopped { step: None } => f.write_str("stopped before training"),
            Self::Aborted { reason } => write!(f, "aborted: {reason}"),
            Self::Failed { failure, .. } => write!(f, "{failure}"),
        }
    }
}

fn tail(f: &mut fmt::Formatter<'_>, log_tail: &str) -> fmt::Result {
    if log_tail.trim().is_empty() {
        return Ok(());
    }
    write!(f, "\n  its log ends with:")?;
    log_tail.lines().try_for_each(|line| write!(f, "\n  | {line}"))
}

fn seconds(ns: u64) -> String {
    let tenths = ns / 100_000_000;
    format!("{}.{} s", tenths / 10, tenths % 10)
}
