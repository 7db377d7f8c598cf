//! What coordinator, agents and workers say to each other.
//!
//! | Message | From | To |
//! | --- | --- | --- |
//! | [`ToAgent`] | coordinator | agent |
//! | [`FromAgent`] | agent | coordinator |
//! | [`ToWorker`] | coordinator (through the agent), agent | worker |
//! | [`FromWorker`] | worker | coordinator (through the agent) |
//!
//! A frame is a JSON header and a raw payload (see [`crate::frame`]); the payload carries bytes of
//! slices, token files and checkpoints, at most [`MAX_CHUNK`] of them.

use std::collections::BTreeMap;
use std::fmt;

use hgct_core::canonical::Hash;
use hgct_core::check::{CheckReport, EngineDescription};
use hgct_core::cluster::{Grant, NodeSpec};
use hgct_core::ids::{DeviceId, EnvironmentId, Generation, Kind, NodeId, Rank, RunId};
use hgct_core::job::Recipe;
use hgct_core::manifest::ShardEnd;
use hgct_core::model::ModelSpec;
use hgct_core::plan::Plan;
use hgct_core::profile::{DeviceProfile, LinkProfile};
use hgct_core::schedule::Action;
use hgct_core::slice::{Role, Slice};
use hgct_core::timeline::{ActionSpan, TransferSpan};
use serde::{Deserialize, Serialize};

/// Version of the protocol; others are refused with both numbers.
pub const PROTOCOL: u32 = 1;

/// Most payload bytes of one frame.
pub const MAX_CHUNK: usize = 1 << 20;

/// An endpoint at which a worker takes data connections. Advertised is not bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSpec {
    /// `IP:PORT`.
    pub address: std::net::SocketAddr,
    /// Network interface, where known.
    pub nic: Option<String>,
    /// Rate, bytes a second, where known.
    pub rate_bytes_per_s: Option<u64>,
    /// NUMA node, where known.
    pub numa: Option<u32>,
}

/// Every message in its envelope: older generations are fenced by whoever receives it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Envelope<M> {
    /// Version of the protocol.
    pub protocol: u32,
    /// The run.
    pub run: RunId,
    /// The sender's generation.
    pub generation: Generation,
    /// Counts the sender's messages on this connection, from 0.
    pub sequence: u64,
    /// What is said.
    pub message: M,
}

/// Coordinator to agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
#[expect(
    clippy::large_enum_variant,
    reason = "most messages are Forward: a box would only add an allocation"
)]
pub enum ToAgent {
    /// The agent is admitted.
    Welcome {
        /// Send a heartbeat this often.
        heartbeat_ns: u64,
        /// Take the coordinator for dead after this silence.
        dead_after_ns: u64,
    },
    /// Sign of life; any other message is one too.
    Heartbeat {
        /// The coordinator's clock, nanoseconds.
        now_ns: u64,
    },
    /// Probe devices and answer with an inventory.
    Discover,
    /// The agent should hold the content with this hash; it answers [`FromAgent::BlobState`].
    Blob {
        /// SHA-256 of the content.
        hash: Hash,
        /// Its length.
        size_bytes: u64,
    },
    /// A piece of a blob that the agent said it lacks; the payload is the bytes.
    BlobChunk {
        /// Which blob.
        hash: Hash,
        /// Where the bytes begin.
        offset: u64,
    },
    /// Start workers, each under its grant.
    StartWorkers {
        /// Which.
        workers: Vec<WorkerStart>,
    },
    /// Hold the workers to their grants from now on (imports and compilation are over).
    HoldGrants,
    /// Hand this to a worker; the payload goes with it.
    Forward {
        /// To whom.
        worker: DeviceId,
        /// What.
        message: ToWorker,
    },
    /// End these workers: ask, then kill after the grace.
    StopWorkers {
        /// Which; empty: all.
        workers: Vec<DeviceId>,
        /// Nanoseconds from the request to the kill.
        grace_ns: u64,
    },
    /// Nothing more will come: end workers and exit.
    Shutdown {
        /// Why, for the log.
        reason: String,
    },
}

/// One worker to start. Names an environment of the agent's own table: no command, path or
/// variable comes over the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStart {
    /// Its stable id.
    pub device: DeviceId,
    /// The environment.
    pub environment: EnvironmentId,
    /// The framework's device string.
    pub device_string: String,
    /// Its grant.
    pub grant: Grant,
}

/// Agent to coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromAgent {
    /// First message after the handshake.
    Join {
        /// The node's name.
        node: NodeId,
        /// Process id, for the log.
        pid: u32,
        /// Memory of the agent, bytes.
        memory_bytes: u64,
    },
    /// Sign of life, with every worker's last one.
    Heartbeat {
        /// The agent's clock, nanoseconds.
        now_ns: u64,
        /// Its resident memory.
        memory_bytes: u64,
        /// The last beat of each worker.
        workers: BTreeMap<DeviceId, WorkerBeat>,
    },
    /// Answer to [`ToAgent::Discover`]: the node with its usable devices (grants not yet set), and
    /// the unusable ones with the reason.
    Inventory {
        /// The node.
        node: NodeSpec,
        /// What cannot be used.
        unusable: Vec<UnusableDevice>,
    },
    /// Whether the agent holds a blob.
    BlobState {
        /// Which.
        hash: Hash,
        /// Complete and verified.
        complete: bool,
        /// Bytes that are there: send from here.
        size_bytes: u64,
    },
    /// A worker's process runs.
    WorkerStarted {
        /// Which.
        worker: DeviceId,
        /// Process id on the agent's node.
        pid: u32,
    },
    /// A worker's process ended.
    WorkerExited {
        /// Which.
        worker: DeviceId,
        /// How.
        exit: Exit,
        /// Last lines of its log.
        log_tail: String,
    },
    /// How grants are held since [`ToAgent::HoldGrants`].
    GrantsHeld {
        /// Held by cgroups.
        isolated: bool,
        /// By what, or why not.
        message: String,
    },
    /// Lines of a worker's log.
    Log {
        /// Whose.
        worker: DeviceId,
        /// The text.
        text: String,
    },
    /// The agent ends its workers and leaves.
    Leaving {
        /// Why.
        reason: String,
    },
    /// A worker says; the payload goes with it.
    Forward {
        /// Who.
        worker: DeviceId,
        /// What.
        message: FromWorker,
    },
}

/// How a process ended. Prints as `exit code 1`, `signal 9 (SIGKILL)`, `could not start: …`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Exit {
    /// By itself.
    Code {
        /// Its exit code.
        code: i32,
    },
    /// By a signal.
    Signal {
        /// The signal's number.
        signal: i32,
    },
    /// By the kernel, since its control group reached the memory of its grant.
    OutOfMemory {
        /// The grant's memory.
        limit_bytes: u64,
    },
    /// It never ran.
    NotStarted {
        /// Why, and what to do.
        reason: String,
    },
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Numbers below 16 are the same on every Linux architecture that frameworks are built for.
        let name = |signal| match signal {
            1 => " (SIGHUP)",
            2 => " (SIGINT)",
            3 => " (SIGQUIT)",
            4 => " (SIGILL)",
            6 => " (SIGABRT)",
            7 => " (SIGBUS)",
            8 => " (SIGFPE)",
            9 => " (SIGKILL)",
            11 => " (SIGSEGV)",
            13 => " (SIGPIPE)",
            15 => " (SIGTERM)",
            _ => "",
        };
        match self {
            Self::Code { code } => write!(f, "exit code {code}"),
            Self::Signal { signal } => write!(f, "signal {signal}{}", name(*signal)),
            Self::OutOfMemory { limit_bytes } => write!(
                f,
                "out of memory: it reached the {} MiB of its grant (give it more in the cluster document, or \
                 use smaller micro-batches)",
                limit_bytes >> 20
            ),
            Self::NotStarted { reason } => write!(f, "could not start: {reason}"),
        }
    }
}

/// A device that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnusableDevice {
    /// What was found: vendor, and environment where there is one.
    pub name: String,
    /// Its kind, as far as known.
    pub kind: Kind,
    /// The environment, where one was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<EnvironmentId>,
    /// Why it cannot be used, and what to do.
    pub reason: String,
}

/// What a worker is doing, as its heartbeat thread sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerBeat {
    /// The worker's clock, nanoseconds.
    pub now_ns: u64,
    /// Step that it is in.
    pub step: u64,
    /// Action that it is in; `None` before its first and between steps, and where nobody can say how
    /// long it may take: the first evaluation, whose kernels compile.
    pub action: Option<Action>,
    /// What it is in without an action ends only when another worker has done something.
    pub waits: bool,
    /// Since when, in its own clock.
    pub since_ns: u64,
    /// Actions that it has completed.
    pub completed: u64,
    /// Its resident memory.
    pub memory_bytes: u64,
}

/// To a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToWorker {
    /// First message, from the agent itself: what only the node knows. The run key never leaves
    /// this pipe.
    Attach {
        /// This worker's device.
        device: DeviceId,
        /// Engine to open: `torch`, `jax`, …
        engine: String,
        /// The framework's device string.
        device_string: String,
        /// Plug-in modules to import with the framework.
        modules: Vec<String>,
        /// Name of the node; peers with the same one share memory.
        node: NodeId,
        /// The data connections' key, as 64 hex digits.
        run_key: String,
        /// Folder of blobs by hash, on this node.
        blobs: String,
        /// Addresses to listen on for data connections.
        listen: Vec<std::net::SocketAddr>,
        /// Addresses to advertise in place of those, ports added.
        advertise: Vec<std::net::IpAddr>,
        /// Send a beat this often.
        heartbeat_ns: u64,
    },
    /// Run the conformance suite and answer [`FromWorker::Checked`].
    Check {
        /// The device's kind, for the report.
        kind: Kind,
        /// Seconds that it may take.
        budget_ns: u64,
    },
    /// Measure layers and answer [`FromWorker::Profiled`].
    Profile {
        /// The model's shape.
        model: ModelSpec,
        /// Tokens a sample.
        seq_len: u32,
        /// Micro-batch sizes, three at most.
        micro_batches: Vec<u32>,
        /// The device's kind, for the row.
        kind: Kind,
        /// Hash of its environment, for the row.
        environment_hash: Hash,
        /// Its grant, for the row.
        grant: Grant,
        /// Nanoseconds that it may take.
        budget_ns: u64,
    },
    /// Load the rank's stages of a plan under a new generation; answers [`FromWorker::Loaded`].
    Load {
        /// The new generation.
        generation: Generation,
        /// This worker's rank in it.
        rank: Rank,
        /// The plan.
        plan: Box<Plan>,
        /// The recipe.
        recipe: Recipe,
        /// Blob of the training tokens.
        train_tokens: Hash,
        /// Blob of the held-out tokens.
        held_out_tokens: Option<Hash>,
        /// Optional behaviour.
        options: WorkerOptions,
    },
    /// Connect to the other ranks; answers [`FromWorker::Connected`].
    Connect {
        /// In rank order, this worker included.
        peers: Vec<PeerSpec>,
        /// Nanoseconds until it has failed.
        deadline_ns: u64,
    },
    /// Train a plan of one rank on this worker by itself, from the seed, and answer
    /// [`FromWorker::TrainedAlone`]: what the kind reaches on its own.
    TrainAlone {
        /// The plan; its one rank is this worker.
        plan: Box<Plan>,
        /// The recipe.
        recipe: Recipe,
        /// Blob of the training tokens.
        train_tokens: Hash,
        /// Steps before those that count.
        warm_up_steps: u64,
        /// Train until at least this much time has gone over counted steps.
        budget_ns: u64,
    },
    /// Measure links to all peers in turn and answer [`FromWorker::LinksMeasured`].
    MeasureLinks,
    /// Rows of a slice that this rank owns; the payload is their f32 bytes.
    State {
        /// Which rows.
        slice: Slice,
        /// Master parameter, m or v.
        role: Role,
    },
    /// Start at a step; owners without [`ToWorker::State`] make initial parameters. Parameters are
    /// gathered first; answers [`FromWorker::Ready`], then steps.
    Start {
        /// The first step to train.
        step: u64,
        /// AdamW's updates so far.
        num_updates: u64,
        /// Stop before this step.
        end_step: u64,
    },
    /// Stop after the current step, with a checkpoint.
    Stop,
    /// Continue these token sequences through the model; answers [`FromWorker::Generated`].
    Generate {
        /// Equal-length prompts.
        prompts: Vec<Vec<u32>>,
        /// Tokens to add.
        num_tokens: u32,
        /// Seed of the sampling.
        seed: u64,
        /// Sampling temperature; 0: the likeliest.
        temperature: f64,
    },
    /// End now.
    Exit,
}

/// Optional behaviour of a loaded worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerOptions {
    /// Use shared memory with peers on the same node.
    pub shared_memory: bool,
    /// For tests: every message arrives this much later.
    pub wire_delay_ns: u64,
    /// Deadline of every wait inside of a step.
    pub step_deadline_ns: u64,
    /// Send the spans of every so-many-th step; 0: of none.
    pub timeline_every: u64,
    /// Write a checkpoint when training ends.
    pub final_checkpoint: bool,
}

/// A rank's place on the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerSpec {
    /// The rank.
    pub rank: Rank,
    /// Its device.
    pub device: DeviceId,
    /// Its node.
    pub node: NodeId,
    /// Where it listens.
    pub endpoints: Vec<EndpointSpec>,
}

/// From a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromWorker {
    /// The engine is imported; the worker takes commands.
    Hello {
        /// What the engine says of itself.
        description: EngineDescription,
        /// Where it takes data connections.
        endpoints: Vec<EndpointSpec>,
    },
    /// Sign of life.
    Beat(WorkerBeat),
    /// The conformance suite's answer.
    Checked {
        /// The report.
        report: CheckReport,
    },
    /// The measurement.
    Profiled {
        /// The device's row.
        profile: DeviceProfile,
    },
    /// The stages stand, without parameters.
    Loaded,
    /// All data connections stand.
    Connected,
    /// The counted steps of [`ToWorker::TrainAlone`].
    TrainedAlone {
        /// In order.
        steps: Vec<StepReport>,
    },
    /// Links to the peers.
    LinksMeasured {
        /// One row a peer.
        links: Vec<LinkProfile>,
    },
    /// Parameters are in place; steps follow.
    Ready,
    /// A step is done on this rank.
    StepDone(StepReport),
    /// Held-out loss after `step` steps; from the rank that knows it.
    Evaluated {
        /// Steps trained so far.
        step: u64,
        /// Sum over tokens, nats.
        #[serde(with = "crate::float")]
        loss_sum: f64,
        /// Tokens.
        num_tokens: u64,
    },
    /// What the rank did in a step.
    Spans {
        /// Step.
        step: u64,
        /// Its actions, in the worker's clock.
        actions: Vec<ActionSpan>,
        /// Its transfers.
        transfers: Vec<TransferSpan>,
    },
    /// A piece of the rank's checkpoint shard; the payload is the bytes.
    ShardChunk {
        /// Steps trained: the checkpoint's name.
        step: u64,
        /// AdamW's updates in it.
        num_updates: u64,
        /// Where the bytes begin in the shard.
        offset: u64,
        /// Set on the last piece: what is in the shard, and its hash as the worker knows it.
        end: Option<ShardEnd>,
    },
    /// Continuations of the prompts, from the rank that holds the head of pipeline 0.
    Generated {
        /// Prompt and added tokens of each.
        sequences: Vec<Vec<u32>>,
    },
    /// Training ended on this rank: at the last step or because of a stop.
    Finished {
        /// Steps trained.
        step: u64,
        /// Whether a stop ended it.
        stopped: bool,
    },
    /// The worker cannot go on.
    Failed {
        /// The chain of causes.
        error: String,
        /// The rank that its error is about, if another.
        peer: Option<Rank>,
    },
}

/// What a rank reports of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step, from 0.
    pub step: u64,
    /// Global sum of token losses, nats (the same on every rank).
    #[serde(with = "crate::float")]
    pub loss_sum: f64,
    /// Global tokens.
    pub num_tokens: u64,
    /// Global gradient norm before clipping (of the mean loss).
    #[serde(with = "crate::float")]
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Whether all ranks skipped the update because loss or norm was not finite.
    pub skipped: bool,
    /// Nanoseconds from the step's start to its end on this rank.
    pub step_ns: u64,
    /// Nanoseconds in forward and backward.
    pub compute_ns: u64,
    /// Nanoseconds in reduce, update and gather.
    pub exchange_ns: u64,
    /// Nanoseconds in gaps of compute with a transfer pending.
    pub exposed_communication_ns: u64,
    /// CPU time of the process inside of forward and backward actions, nanoseconds.
    pub compute_cpu_ns: u64,
    /// Largest resident memory since the plan was loaded, bytes.
    pub memory_bytes: u64,
}
