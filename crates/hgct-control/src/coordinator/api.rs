//! What goes into the coordinator's machine and what comes out.

use std::collections::BTreeMap;

use hgct_core::canonical::Hash;
use hgct_core::check::EngineDescription;
use hgct_core::cluster::NodeSpec;
use hgct_core::ids::{DeviceId, Generation, NodeId, Rank, RunId};
use hgct_core::job::Recipe;
use hgct_core::manifest::ShardEnd;
use hgct_core::plan::Plan;
use hgct_core::profile::LinkProfile;
use hgct_core::slice::{Role, Slice};
use hgct_core::timeline::{ActionSpan, Timeline, TransferSpan};
use serde::{Deserialize, Serialize};

use super::outcome::{Failure, LostCause, Outcome};
use crate::detector::{Limits, Verdict};
use crate::message::{
    Envelope, FromAgent, FromWorker, StepReport, ToAgent, ToWorker, UnusableDevice, WorkerBeat,
    WorkerOptions, WorkerStart,
};

/// What a coordinator is made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The run.
    pub run: RunId,
    /// Generation before the first load. A coordinator that takes a run over raises the epoch.
    pub generation: Generation,
    /// Agents to wait for.
    pub agents: usize,
    /// Time to wait for them.
    pub gather_ns: u64,
    /// The failure detector's limits.
    pub limits: Limits,
    /// From "end" to the kill of a worker.
    pub grace_ns: u64,
    /// How long to wait for a better cause than the first symptom.
    pub cause_ns: u64,
    /// How long to wait for agents to leave, beyond the grace.
    pub leave_ns: u64,
}

impl Config {
    /// Settings as the documents promise them: from verdict to [`Update::Ended`] at most 0.3 s for
    /// the cause, 1 s of grace and 1.5 s for agents that do not answer.
    pub fn new(run: RunId, agents: usize, gather_ns: u64) -> Self {
        Self {
            run,
            generation: Generation::default(),
            agents,
            gather_ns,
            limits: Limits::default(),
            grace_ns: 1_000_000_000,
            cause_ns: 300_000_000,
            leave_ns: 1_500_000_000,
        }
    }
}

/// One control connection, numbered by the shell and never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConnectionId(pub u64);

/// What happens to the coordinator. Written to a log with its time, the events of a run replay it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Event {
    /// A connection has finished its handshake ([`crate::auth`]).
    AgentJoined {
        /// The new connection.
        connection: ConnectionId,
        /// The node that was proved.
        node: NodeId,
    },
    /// A frame came.
    AgentMessage {
        /// From where.
        connection: ConnectionId,
        /// Its header.
        envelope: Box<Envelope<FromAgent>>,
        /// Its payload.
        #[serde(with = "crate::payload")]
        payload: Vec<u8>,
    },
    /// A connection is gone: end of file, error of the socket or of the decoder. Not needed, and
    /// harmless, after [`Effect::Close`].
    AgentLost {
        /// Which.
        connection: ConnectionId,
        /// Why.
        cause: LostCause,
    },
    /// The driver wants something.
    Command {
        /// What.
        command: Box<Command>,
    },
    /// Time passed: [`super::Coordinator::poll_timeout`] is over.
    Tick,
    /// Time passed in which the shell took no frames, since its driver is behind: whoever was silent
    /// since the last event may have spoken.
    Behind,
}

/// What the driver may want. One that does not fit the phase is answered with
/// [`Update::Rejected`] and changes nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Command {
    /// Ask all agents for their devices → [`Update::Inventory`].
    Discover {
        /// Time to answer.
        deadline_ns: u64,
    },
    /// Agents should hold these contents → [`Update::BlobNeeded`] for each piece that is missing,
    /// then [`Update::BlobsHeld`].
    OfferBlobs {
        /// Hash and length of each.
        blobs: Vec<(Hash, u64)>,
        /// To whom; empty: all nodes.
        nodes: Vec<NodeId>,
        /// Time until all hold all.
        deadline_ns: u64,
    },
    /// A piece of a blob for a node that needs it.
    BlobChunk {
        /// To whom.
        node: NodeId,
        /// Which blob.
        hash: Hash,
        /// Where the bytes begin.
        offset: u64,
        /// At most [`crate::message::MAX_CHUNK`] bytes.
        #[serde(with = "crate::payload")]
        bytes: Vec<u8>,
    },
    /// Start workers → [`Update::WorkerReady`] or [`Update::WorkerGone`] for each, then
    /// [`Update::WorkersStarted`].
    StartWorkers {
        /// Node and what to start there.
        workers: Vec<(NodeId, WorkerStart)>,
        /// Time until their engines are imported.
        deadline_ns: u64,
    },
    /// End workers and wait for their exit → [`Update::WorkersStopped`].
    StopWorkers {
        /// Which; empty: all.
        workers: Vec<DeviceId>,
    },
    /// Hold workers to their grants → [`Update::GrantsHeld`].
    HoldGrants {
        /// Time to answer.
        deadline_ns: u64,
    },
    /// Hand each worker one request that it answers by itself (check, profile) →
    /// [`Update::Answer`] for each, then [`Update::Answered`]. Requests to generate go to all
    /// ranks of one pipeline together and have one answer.
    Ask {
        /// Whom and what.
        requests: Vec<(DeviceId, ToWorker)>,
        /// Time to answer.
        deadline_ns: u64,
    },
    /// Connect workers and measure their links under a generation of its own →
    /// [`Update::LinksMeasured`].
    MeasureLinks {
        /// Between whom.
        workers: Vec<DeviceId>,
        /// Time for all of it.
        deadline_ns: u64,
    },
    /// Raise the generation, load the plan's stages, connect the ranks → [`Update::Loaded`].
    Load(Box<LoadSpec>),
    /// Rows of a slice for the rank that owns them; between [`Update::Loaded`] and
    /// [`Command::Start`].
    State {
        /// To whom.
        rank: Rank,
        /// Which rows.
        slice: Slice,
        /// Master parameter, m or v.
        role: Role,
        /// Their f32 bytes.
        #[serde(with = "crate::payload")]
        bytes: Vec<u8>,
    },
    /// Train → [`Update::Running`], [`Update::StepCommitted`] for each step, [`Update::Finished`].
    Start {
        /// First step to train.
        step: u64,
        /// AdamW's updates so far.
        num_updates: u64,
        /// Stop before this step.
        end_step: u64,
        /// Time until all ranks are ready.
        deadline_ns: u64,
    },
    /// Stop after the current step with a checkpoint; a second time: at once.
    Stop,
    /// Nothing more is wanted: end everything → [`Update::Ended`].
    End,
    /// The driver cannot go on: end everything.
    Abort {
        /// Why.
        reason: String,
    },
}

/// What to load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadSpec {
    /// The plan; each of its devices has a worker that is ready.
    pub plan: Plan,
    /// Its simulation, for the allowance of each action.
    pub timeline: Option<Timeline>,
    /// The recipe.
    pub recipe: Recipe,
    /// Blob of the training tokens.
    pub train_tokens: Hash,
    /// Blob of the held-out tokens.
    pub held_out_tokens: Option<Hash>,
    /// Optional behaviour.
    pub options: WorkerOptions,
    /// Time to load and to connect.
    pub deadline_ns: u64,
}

/// What the shell must do, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write a frame. Never wait for a slow agent here: queue it.
    Send {
        /// Where to.
        connection: ConnectionId,
        /// Its header.
        envelope: Box<Envelope<ToAgent>>,
        /// Its payload.
        payload: Vec<u8>,
    },
    /// Write what is queued, for a moment at most, then close. The number is not used any more.
    Close {
        /// Which.
        connection: ConnectionId,
        /// Why, for the log.
        reason: String,
    },
    /// Tell the driver.
    Update(Box<Update>),
}

/// How a worker's clock relates to the coordinator's, from its beats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClockOffset {
    /// Add this to the worker's times.
    pub offset_ns: i64,
    /// By how much the delay of beats varies; the offset is off by about the delay of the fastest.
    pub uncertainty_ns: u64,
}

/// What the driver hears.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Update {
    /// An agent is admitted.
    AgentJoined {
        /// Its node.
        node: NodeId,
        /// Agents so far.
        joined: usize,
        /// Agents wanted.
        wanted: usize,
    },
    /// An agent is lost. Before all are there it may join again; later its loss ends the run.
    AgentGone {
        /// Its node.
        node: NodeId,
        /// Why.
        cause: LostCause,
    },
    /// All agents are there: commands are taken from now on.
    Gathered {
        /// Their nodes.
        nodes: Vec<NodeId>,
    },
    /// Someone is late.
    Suspect {
        /// Who.
        verdict: Verdict,
    },
    /// A sign of life of an agent.
    AgentAlive {
        /// Its node.
        node: NodeId,
        /// Its resident memory.
        memory_bytes: u64,
    },
    /// A sign of life of a worker.
    WorkerAlive {
        /// Which.
        worker: DeviceId,
        /// What it does.
        beat: WorkerBeat,
    },
    /// All devices of all nodes.
    Inventory {
        /// A row a node, by name.
        nodes: Vec<(NodeSpec, Vec<UnusableDevice>)>,
        /// Nodes that did not answer in time.
        missing: Vec<NodeId>,
    },
    /// Send this blob from here on, in order, with [`Command::BlobChunk`].
    BlobNeeded {
        /// To whom.
        node: NodeId,
        /// Which blob.
        hash: Hash,
        /// First byte that is missing.
        offset: u64,
    },
    /// The offered blobs are where they are wanted.
    BlobsHeld {
        /// What did not get there in time.
        missing: Vec<(NodeId, Hash)>,
    },
    /// A worker has imported its engine.
    WorkerReady {
        /// Which.
        worker: DeviceId,
        /// What the engine says.
        description: EngineDescription,
    },
    /// All workers of a start are ready or gone.
    WorkersStarted {
        /// Those that are ready.
        ready: Vec<DeviceId>,
        /// Those that are not.
        failed: Vec<(DeviceId, Failure)>,
    },
    /// Workers of a stop are gone.
    WorkersStopped {
        /// Which.
        workers: Vec<DeviceId>,
    },
    /// A worker cannot be used any more. Ends the run only if it is part of a loaded plan.
    WorkerGone {
        /// Which.
        worker: DeviceId,
        /// Why.
        failure: Failure,
    },
    /// How grants are held, by node.
    GrantsHeld {
        /// By cgroups or not, and by what.
        nodes: BTreeMap<NodeId, (bool, String)>,
        /// Nodes that did not answer in time.
        missing: Vec<NodeId>,
    },
    /// A worker's answer to a request.
    Answer {
        /// Who.
        worker: DeviceId,
        /// `Checked`, `Profiled`, `TrainedAlone` or `Generated`.
        answer: FromWorker,
    },
    /// All requests of an [`Command::Ask`] are answered, or cannot be.
    Answered {
        /// Those that gave no answer.
        failed: Vec<(DeviceId, Failure)>,
    },
    /// Links between workers.
    LinksMeasured {
        /// One row a directed pair.
        links: Vec<LinkProfile>,
        /// Those that gave no answer.
        failed: Vec<(DeviceId, Failure)>,
    },
    /// Stages stand and ranks are connected: send state, then start.
    Loaded {
        /// The new generation.
        generation: Generation,
    },
    /// All ranks have their parameters: steps follow.
    Running,
    /// All ranks have done a step and agree on its loss. Each step once, in order.
    StepCommitted {
        /// The step.
        step: u64,
        /// One report a rank.
        reports: Vec<StepReport>,
    },
    /// All ranks skipped a step whose loss or gradient norm was not finite.
    StepSkipped {
        /// The step.
        step: u64,
        /// How many in a row; three end the run.
        in_a_row: u32,
    },
    /// Held-out loss.
    Evaluated {
        /// Steps trained so far.
        step: u64,
        /// Sum over tokens, nats.
        #[serde(with = "crate::float")]
        loss_sum: f64,
        /// Tokens.
        num_tokens: u64,
    },
    /// What a rank did in a step.
    Spans {
        /// The rank.
        rank: Rank,
        /// The step.
        step: u64,
        /// How its times become the coordinator's.
        clock: ClockOffset,
        /// Its actions, in the worker's clock.
        actions: Vec<ActionSpan>,
        /// Its transfers.
        transfers: Vec<TransferSpan>,
    },
    /// A piece of a rank's checkpoint shard.
    ShardChunk {
        /// The rank.
        rank: Rank,
        /// Steps trained: the checkpoint's name.
        step: u64,
        /// AdamW's updates in it.
        num_updates: u64,
        /// Where the bytes begin in the shard.
        offset: u64,
        /// Set on the last piece: what is in the shard, and its hash as the worker knows it.
        end: Option<ShardEnd>,
        /// The bytes, as they came.
        #[serde(with = "crate::payload")]
        bytes: Vec<u8>,
    },
    /// Workers were told to stop after their step.
    Stopping,
    /// All ranks have finished; every chunk of their checkpoints has passed before. The workers
    /// are still loaded: they can generate, or be loaded again.
    Finished {
        /// Steps trained.
        step: u64,
        /// Whether a stop ended it.
        stopped: bool,
    },
    /// Lines of a worker's log.
    Log {
        /// Whose.
        worker: DeviceId,
        /// The text.
        text: String,
    },
    /// A command that does not fit.
    Rejected {
        /// Which.
        command: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The last update: nothing more will come, and no more is to be done than the effects before.
    Ended {
        /// How.
        outcome: Outcome,
    },
}
