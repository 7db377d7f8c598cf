//! A worker's process without a framework: it answers, beats, steps together with its peers, and
//! fails as processes do.

use std::collections::BTreeMap;

use hgct_control::frame::{Inbox, Outbox};
use hgct_control::message::{Envelope, FromWorker, StepReport, WorkerBeat};
use hgct_core::check::{EngineDescription, Granularity};
use hgct_core::ids::{DeviceId, Generation, NodeId, Rank, RunId};
use hgct_core::plan::StageId;
use hgct_core::schedule::{Action, Operation};

/// One process.
#[allow(clippy::struct_excessive_bools, reason = "each can be true beside any other")]
pub(crate) struct Process {
    pub(crate) node: NodeId,
    pub(crate) alive: bool,
    /// Stopped as by SIGSTOP: neither beats nor acts.
    pub(crate) hung: bool,
    /// Beats, but computes for ever.
    pub(crate) stalled: bool,
    pub(crate) failed: bool,
    pub(crate) generation: Generation,
    pub(crate) rank: Option<Rank>,
    pub(crate) action: Option<Operation>,
    /// Outside of an action it waits for others.
    pub(crate) waits: bool,
    pub(crate) since_ns: u64,
    pub(crate) step: u64,
    pub(crate) end_step: u64,
    pub(crate) stop: bool,
    pub(crate) training: bool,
    pub(crate) completed: u64,
    /// Added to the world's time by this process's clock.
    pub(crate) clock_ns: u64,
    pub(crate) inbox: Inbox,
    outbox: Outbox,
}

impl Process {
    pub(crate) fn new(run: &RunId, node: NodeId, clock_ns: u64) -> Self {
        Self {
            node,
            alive: true,
            hung: false,
            stalled: false,
            failed: false,
            generation: Generation::default(),
            rank: None,
            action: None,
            waits: false,
            since_ns: clock_ns,
            step: 0,
            end_step: 0,
            stop: false,
            training: false,
            completed: 0,
            clock_ns,
            inbox: Inbox::new(run.clone()),
            outbox: Outbox::new(run.clone()),
        }
    }

    pub(crate) fn seal(&mut self, generation: Generation, message: FromWorker) -> Envelope<FromWorker> {
        self.outbox.seal(generation, message)
    }

    pub(crate) fn acts(&self) -> bool {
        self.alive && !self.hung && !self.failed
    }

    pub(crate) fn enter(&mut self, now_ns: u64, action: Option<Operation>) {
        self.completed += u64::from(self.action.is_some());
        self.action = action;
        self.waits = false;
        self.since_ns = now_ns + self.clock_ns;
    }

    pub(crate) fn beat(&self, now_ns: u64) -> WorkerBeat {
        let stage = StageId(self.rank.map_or(0, |rank| rank.0));
        WorkerBeat {
            now_ns: now_ns + self.clock_ns,
            step: self.step,
            action: self.action.map(|operation| Action { stage, operation, micro_batch: 0 }),
            waits: self.waits,
            since_ns: self.since_ns,
            completed: self.completed,
            memory_bytes: 1,
        }
    }
}

/// Ranks that step together under one generation.
#[derive(Default)]
pub(crate) struct Group {
    pub(crate) devices: Vec<DeviceId>,
    /// The step that each rank has come to.
    pub(crate) arrived: BTreeMap<Rank, u64>,
    pub(crate) connected: u32,
}

/// The loss that all ranks must agree on.
pub(crate) fn loss(generation: Generation, step: u64) -> f64 {
    1000.0 / (1 + step) as f64 + generation.sequence as f64 / 7.0
}

pub(crate) fn report(generation: Generation, step: u64, loss_sum: f64) -> StepReport {
    let _ = generation;
    StepReport {
        step,
        loss_sum,
        num_tokens: 64,
        grad_norm: 1.0,
        learning_rate: 1e-3,
        skipped: !loss_sum.is_finite(),
        step_ns: 1,
        compute_ns: 1,
        exchange_ns: 0,
        exposed_communication_ns: 0,
        compute_cpu_ns: 1,
        memory_bytes: 1,
    }
}

pub(crate) fn description() -> EngineDescription {
    EngineDescription {
        engine: "none".into(),
        framework_version: "1".into(),
        device: "none".into(),
        dtypes: Vec::new(),
        granularity: Granularity::Layer,
        split_backward: false,
        recompute: true,
        tensor_parallel: false,
        deterministic: true,
        memory_bytes: None,
    }
}
