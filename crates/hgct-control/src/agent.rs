//! The agent as a machine: events in, effects out; no clock, no sockets, no processes.
//!
//! # Driving it
//!
//! The shell connects, runs the client's side of [`crate::auth::Handshake`], makes the machine with
//! the run that it learnt there, and then, as with the coordinator:
//!
//! 1. Take every [`Agent::poll_effect`] until `None`.
//! 2. Wait for an event until [`Agent::poll_timeout`]; call [`Agent::handle`] with it, or with
//!    [`Event::Tick`].
//! 3. After [`Effect::Exit`] leave.
//!
//! The shell's duties:
//!
//! - Each worker is started by exec in a process group of its own, with pipes for frames. Read its
//!   frames to the end *before* saying [`Event::WorkerExited`], so that its last words come first;
//!   kill what is left of its process group then.
//! - Writes to workers and to the coordinator are queued; no effect waits for a slow reader.
//! - When the shell itself is told to end (SIGTERM), it says [`Event::Terminate`].
//! - Last of all, if the machine is lost too: workers end by themselves when their pipe closes.
//!
//! Whatever happens to the coordinator, no worker outlives it for longer than `dead_after_ns` of
//! [`ToAgent::Welcome`].

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};

use hgct_core::canonical::Hash;
use hgct_core::cluster::NodeSpec;
use hgct_core::ids::{DeviceId, Generation, NodeId, RunId};
use serde::{Deserialize, Serialize};

use crate::auth::Key;
use crate::frame::{self, Inbox, Outbox};
use crate::message::{
    Envelope, Exit, FromAgent, FromWorker, ToAgent, ToWorker, UnusableDevice, WorkerBeat, WorkerStart,
};

const SECOND_NS: u64 = 1_000_000_000;
/// From "end" to the kill where the coordinator gave no grace.
const GRACE_NS: u64 = SECOND_NS;
/// How long a killed process may take to be gone before the agent leaves without it.
const REAP_NS: u64 = SECOND_NS;
const SIGKILL: i32 = 9;

/// What an agent is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The run, as the handshake proved it.
    pub run: RunId,
    /// This node, as the handshake proved it.
    pub node: NodeId,
    /// This process, for the log.
    pub pid: u32,
    /// Resident memory of this process, bytes.
    pub memory_bytes: u64,
    /// Key of the run's data connections.
    pub data_key: Key,
    /// Folder of blobs by hash.
    pub blobs: String,
    /// Addresses that workers listen on.
    pub listen: Vec<SocketAddr>,
    /// Addresses to advertise in place of those.
    pub advertise: Vec<IpAddr>,
}

/// What happens to the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Event {
    /// A frame of the coordinator.
    Message {
        /// Its header.
        envelope: Box<Envelope<ToAgent>>,
        /// Its payload.
        #[serde(with = "crate::payload")]
        payload: Vec<u8>,
    },
    /// The control connection is gone.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// Answer to [`Effect::Discover`].
    Inventory {
        /// The node with its usable devices.
        node: NodeSpec,
        /// What cannot be used.
        unusable: Vec<UnusableDevice>,
    },
    /// Answer to [`Effect::CheckBlob`], and after the [`Effect::StoreChunk`] that completes a blob
    /// or cannot be stored.
    BlobState {
        /// Which.
        hash: Hash,
        /// Complete and verified.
        complete: bool,
        /// Bytes that are there, in order from the first.
        size_bytes: u64,
    },
    /// Answer to [`Effect::HoldGrants`].
    GrantsHeld {
        /// Held by cgroups.
        isolated: bool,
        /// By what, or why not.
        message: String,
    },
    /// Answer to [`Effect::Spawn`]: the process runs. The other answer is
    /// [`Event::WorkerExited`] with [`Exit::NotStarted`].
    WorkerStarted {
        /// Which.
        worker: DeviceId,
        /// Its process.
        pid: u32,
        /// Engine of its environment, from this agent's own table.
        engine: String,
        /// Plug-in modules of its environment.
        modules: Vec<String>,
    },
    /// A frame of a worker.
    WorkerMessage {
        /// Whose.
        worker: DeviceId,
        /// Its header.
        envelope: Box<Envelope<FromWorker>>,
        /// Its payload.
        #[serde(with = "crate::payload")]
        payload: Vec<u8>,
    },
    /// A worker's pipe carries what is no frame.
    WorkerBroken {
        /// Whose.
        worker: DeviceId,
        /// What the decoder said.
        error: String,
    },
    /// A worker's process ended and all its frames were handed over.
    WorkerExited {
        /// Which.
        worker: DeviceId,
        /// How.
        exit: Exit,
        /// Last lines of its log.
        log_tail: String,
    },
    /// Lines of a worker's log.
    WorkerLog {
        /// Whose.
        worker: DeviceId,
        /// The text.
        text: String,
    },
    /// The agent itself is told to end.
    Terminate {
        /// By what, for the log.
        reason: String,
    },
    /// Time passed.
    Tick {
        /// Resident memory of this process, bytes.
        memory_bytes: u64,
    },
}

/// What the shell must do, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write a frame to the coordinator.
    Send {
        /// Its header.
        envelope: Box<Envelope<FromAgent>>,
        /// Its payload.
        payload: Vec<u8>,
    },
    /// Probe devices → [`Event::Inventory`].
    Discover,
    /// Look what is there of a blob → [`Event::BlobState`].
    CheckBlob {
        /// Which.
        hash: Hash,
        /// Its length when complete.
        size_bytes: u64,
    },
    /// Add bytes to a blob.
    StoreChunk {
        /// Which.
        hash: Hash,
        /// Where they begin.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Start a worker's process → [`Event::WorkerStarted`] or [`Event::WorkerExited`].
    Spawn {
        /// Which, from which environment, under which grant.
        start: WorkerStart,
    },
    /// Write a frame to a worker.
    WriteWorker {
        /// Whose pipe.
        worker: DeviceId,
        /// Its header.
        envelope: Box<Envelope<ToWorker>>,
        /// Its payload.
        payload: Vec<u8>,
    },
    /// Send a signal to a worker's process group.
    Kill {
        /// Which.
        worker: DeviceId,
        /// The signal.
        signal: i32,
    },
    /// Hold workers to their grants → [`Event::GrantsHeld`].
    HoldGrants,
    /// The last effect: write what is queued, for a moment at most, then leave.
    Exit {
        /// Why, for the log.
        reason: String,
        /// Whether the coordinator wanted it.
        orderly: bool,
    },
}

/// The machine. See the module for how to drive it.
#[derive(Debug)]
pub struct Agent {
    config: Config,
    state: State,
    generation: Generation,
    inbox: Inbox,
    outbox: Outbox,
    heartbeat_ns: u64,
    dead_after_ns: u64,
    heard_ns: u64,
    last_ns: u64,
    next_heartbeat_ns: u64,
    memory_bytes: u64,
    workers: BTreeMap<DeviceId, Worker>,
    effects: VecDeque<Effect>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Active,
    /// Waits for its workers' end.
    Leaving {
        reason: String,
        orderly: bool,
    },
    Gone,
}

#[derive(Debug)]
struct Worker {
    start: WorkerStart,
    inbox: Inbox,
    outbox: Outbox,
    last_beat: Option<WorkerBeat>,
    life: Life,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Spawning,
    Running,
    /// Asked to end; killed then.
    Ending {
        kill_ns: u64,
    },
    /// Killed; not waited for beyond then.
    Killed {
        until_ns: u64,
    },
}

impl Agent {
    /// An agent whose handshake is done.
    pub fn new(config: Config, now_ns: u64) -> Self {
        let mut agent = Self {
            state: State::Active,
            generation: Generation::default(),
            inbox: Inbox::new(config.run.clone()),
            outbox: Outbox::new(config.run.clone()),
            heartbeat_ns: SECOND_NS / 2,
            dead_after_ns: 3 * SECOND_NS,
            heard_ns: now_ns,
            last_ns: now_ns,
            next_heartbeat_ns: now_ns.saturating_add(SECOND_NS / 2),
            memory_bytes: config.memory_bytes,
            workers: BTreeMap::new(),
            effects: VecDeque::new(),
            config,
        };
        let (node, pid, memory_bytes) = (agent.config.node.clone(), agent.config.pid, agent.memory_bytes);
        agent.send(FromAgent::Join { node, pid, memory_bytes });
        agent
    }

    /// Takes what happened.
    pub fn handle(&mut self, now_ns: u64, event: Event) {
        if self.state == State::Gone {
            return;
        }
        let now_ns = now_ns.max(self.last_ns);
        let gap_ns = now_ns - self.last_ns;
        self.last_ns = now_ns;
        // Ticks come at least every heartbeat; a longer gap is this process's own, and the
        // coordinator may have spoken in it.
        if gap_ns > self.dead_after_ns / 2 {
            self.heard_ns = self.heard_ns.saturating_add(gap_ns);
        }
        match event {
            Event::Message { envelope, payload } => self.message(now_ns, *envelope, payload),
            Event::Disconnected { reason } => {
                self.leave_at_once(now_ns, format!("the coordinator is gone: {reason}"));
            }
            Event::Inventory { node, unusable } => self.send(FromAgent::Inventory { node, unusable }),
            Event::BlobState { hash, complete, size_bytes } => {
                self.send(FromAgent::BlobState { hash, complete, size_bytes });
            }
            Event::GrantsHeld { isolated, message } => self.send(FromAgent::GrantsHeld { isolated, message }),
            Event::WorkerStarted { worker, pid, engine, modules } => {
                self.worker_started(now_ns, worker, pid, engine, modules);
            }
            Event::WorkerMessage { worker, envelope, payload } => {
                self.worker_message(now_ns, worker, *envelope, payload);
            }
            Event::WorkerBroken { worker, error } => self.worker_broken(now_ns, worker, &error),
            Event::WorkerExited { worker, exit, log_tail } => {
                if self.workers.remove(&worker).is_some() {
                    self.send(FromAgent::WorkerExited { worker, exit, log_tail });
                }
            }
            Event::WorkerLog { worker, text } => self.send(FromAgent::Log { worker, text }),
            Event::Terminate { reason } => {
                self.send(FromAgent::Leaving { reason: reason.clone() });
                self.leave(now_ns, reason, false);
            }
            Event::Tick { memory_bytes } => self.memory_bytes = memory_bytes,
        }
        self.advance(now_ns);
    }

    /// What to do next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to call [`Self::handle`] with [`Event::Tick`] if nothing else happens. `None`: never.
    pub fn poll_timeout(&self) -> Option<u64> {
        if self.state == State::Gone {
            return None;
        }
        let leaves = self.state != State::Active;
        let ends = self.workers.values().filter_map(|worker| match worker.life {
            Life::Ending { kill_ns } => Some(kill_ns),
            // Once it is over, only the last one's matters.
            Life::Killed { until_ns } => Some(until_ns).filter(|at| leaves && *at > self.last_ns),
            Life::Spawning | Life::Running => None,
        });
        let silence_ns = self.heard_ns.saturating_add(self.dead_after_ns);
        let silence = Some(silence_ns).filter(|_| !leaves);
        ends.chain(silence).chain([self.next_heartbeat_ns]).min()
    }

    fn advance(&mut self, now_ns: u64) {
        let silent_ns = now_ns.saturating_sub(self.heard_ns);
        if self.state == State::Active && silent_ns >= self.dead_after_ns {
            let reason = format!("the coordinator was silent for {} ms", silent_ns / 1_000_000);
            // It may be deaf in one direction only, and then name the right cause.
            self.send(FromAgent::Leaving { reason: reason.clone() });
            self.leave_at_once(now_ns, reason);
        }
        let late = |worker: &Worker| matches!(worker.life, Life::Ending { kill_ns } if now_ns >= kill_ns);
        for worker in self.chosen(late) {
            self.kill(now_ns, &worker);
        }
        if now_ns >= self.next_heartbeat_ns {
            self.next_heartbeat_ns = now_ns.saturating_add(self.heartbeat_ns);
            let beats =
                self.workers.iter().filter_map(|(device, w)| Some((device.clone(), w.last_beat.clone()?)));
            let workers = beats.collect();
            self.send(FromAgent::Heartbeat { now_ns, memory_bytes: self.memory_bytes, workers });
        }
        let gone = |worker: &Worker| matches!(worker.life, Life::Killed { until_ns } if now_ns >= until_ns);
        if let State::Leaving { reason, orderly } = &self.state
            && self.workers.values().all(gone)
        {
            let (reason, orderly) = (reason.clone(), *orderly);
            self.effects.push_back(Effect::Exit { reason, orderly });
            self.state = State::Gone;
        }
    }

    fn message(&mut self, now_ns: u64, envelope: Envelope<ToAgent>, payload: Vec<u8>) {
        if let Err(error) = self.inbox.admit(&envelope) {
            self.send(FromAgent::Leaving { reason: error.to_string() });
            self.leave_at_once(now_ns, error.to_string());
            return;
        }
        self.heard_ns = now_ns;
        if frame::fence(envelope.generation, self.generation).is_err() {
            return;
        }
        self.generation = envelope.generation;
        match envelope.message {
            ToAgent::StopWorkers { workers, grace_ns } => self.stop(now_ns, &workers, grace_ns),
            ToAgent::Shutdown { reason } => self.leave(now_ns, reason, true),
            // An agent that leaves begins nothing new.
            _ if self.state != State::Active => {}
            ToAgent::Welcome { heartbeat_ns, dead_after_ns } => {
                self.heartbeat_ns = heartbeat_ns.max(SECOND_NS / 1000);
                self.dead_after_ns = dead_after_ns.max(self.heartbeat_ns);
            }
            // Only the agent itself attaches: what only the node knows does not come from outside.
            ToAgent::Heartbeat { .. } | ToAgent::Forward { message: ToWorker::Attach { .. }, .. } => {}
            ToAgent::Discover => self.effects.push_back(Effect::Discover),
            ToAgent::Blob { hash, size_bytes } => {
                self.effects.push_back(Effect::CheckBlob { hash, size_bytes });
            }
            ToAgent::BlobChunk { hash, offset } => {
                self.effects.push_back(Effect::StoreChunk { hash, offset, bytes: payload });
            }
            ToAgent::StartWorkers { workers } => workers.into_iter().for_each(|start| self.spawn(start)),
            ToAgent::HoldGrants => self.effects.push_back(Effect::HoldGrants),
            ToAgent::Forward { worker, message } => self.write(&worker, message, payload),
        }
    }

    fn spawn(&mut self, start: WorkerStart) {
        let worker = start.device.clone();
        if self.workers.contains_key(&worker) {
            let exit = Exit::NotStarted { reason: "a worker of this device runs already".into() };
            self.send(FromAgent::WorkerExited { worker, exit, log_tail: String::new() });
            return;
        }
        let run = &self.config.run;
        let (inbox, outbox) = (Inbox::new(run.clone()), Outbox::new(run.clone()));
        let entry = Worker { start: start.clone(), inbox, outbox, last_beat: None, life: Life::Spawning };
        self.workers.insert(worker, entry);
        self.effects.push_back(Effect::Spawn { start });
    }

    fn worker_started(
        &mut self,
        now_ns: u64,
        worker: DeviceId,
        pid: u32,
        engine: String,
        modules: Vec<String>,
    ) {
        let Some(entry) = self.workers.get_mut(&worker) else { return };
        if entry.life != Life::Spawning {
            // It was to end before it ran.
            self.kill(now_ns, &worker);
            return;
        }
        entry.life = Life::Running;
        let attach = ToWorker::Attach {
            device: worker.clone(),
            engine,
            device_string: entry.start.device_string.clone(),
            modules,
            node: self.config.node.clone(),
            run_key: self.config.data_key.to_hex(),
            blobs: self.config.blobs.clone(),
            listen: self.config.listen.clone(),
            advertise: self.config.advertise.clone(),
            heartbeat_ns: self.heartbeat_ns,
        };
        self.write(&worker, attach, Vec::new());
        self.send(FromAgent::WorkerStarted { worker, pid });
    }

    fn worker_message(
        &mut self,
        now_ns: u64,
        worker: DeviceId,
        envelope: Envelope<FromWorker>,
        payload: Vec<u8>,
    ) {
        let Some(entry) = self.workers.get_mut(&worker) else { return };
        if let Err(error) = entry.inbox.admit(&envelope) {
            self.worker_broken(now_ns, worker, &error.to_string());
            return;
        }
        if envelope.generation > self.generation {
            let error = format!("a message of {}, which has not begun", envelope.generation);
            self.worker_broken(now_ns, worker, &error);
            return;
        }
        if let FromWorker::Beat(beat) = &envelope.message {
            entry.last_beat = Some(beat.clone());
        }
        // Under the worker's own generation: the coordinator fences it.
        let message = FromAgent::Forward { worker, message: envelope.message };
        self.send_with(envelope.generation, message, payload);
    }

    /// The worker is heard no more; it is given up.
    fn worker_broken(&mut self, now_ns: u64, worker: DeviceId, error: &str) {
        if self.workers.get(&worker).is_none_or(|entry| matches!(entry.life, Life::Killed { .. })) {
            return;
        }
        self.kill(now_ns, &worker);
        let error = format!("its pipe carries what is no message: {error}");
        self.send(FromAgent::Forward { worker, message: FromWorker::Failed { error, peer: None } });
    }

    /// Asks workers to end; all where none is named.
    fn stop(&mut self, now_ns: u64, named: &[DeviceId], grace_ns: u64) {
        let kill_ns = now_ns.saturating_add(grace_ns);
        for device in self.chosen(|worker| {
            let is_named = named.is_empty() || named.contains(&worker.start.device);
            is_named && matches!(worker.life, Life::Spawning | Life::Running)
        }) {
            let Some(worker) = self.workers.get_mut(&device) else { continue };
            let runs = worker.life == Life::Running;
            worker.life = Life::Ending { kill_ns };
            if runs {
                self.write(&device, ToWorker::Exit, Vec::new());
            }
        }
    }

    fn leave(&mut self, now_ns: u64, reason: String, orderly: bool) {
        if self.state == State::Active {
            self.state = State::Leaving { reason, orderly };
        }
        self.stop(now_ns, &[], GRACE_NS);
    }

    /// Without the coordinator there is nothing to be careful for.
    fn leave_at_once(&mut self, now_ns: u64, reason: String) {
        if self.state == State::Active {
            self.state = State::Leaving { reason, orderly: false };
        }
        for worker in self.chosen(|worker| !matches!(worker.life, Life::Killed { .. })) {
            self.kill(now_ns, &worker);
        }
    }

    fn kill(&mut self, now_ns: u64, worker: &DeviceId) {
        if let Some(entry) = self.workers.get_mut(worker) {
            entry.life = Life::Killed { until_ns: now_ns.saturating_add(REAP_NS) };
            self.effects.push_back(Effect::Kill { worker: worker.clone(), signal: SIGKILL });
        }
    }

    fn chosen(&self, is_chosen: impl Fn(&Worker) -> bool) -> Vec<DeviceId> {
        self.workers
            .iter()
            .filter(|(_, worker)| is_chosen(worker))
            .map(|(device, _)| device.clone())
            .collect()
    }

    fn write(&mut self, worker: &DeviceId, message: ToWorker, payload: Vec<u8>) {
        if let Some(entry) = self.workers.get_mut(worker) {
            let envelope = Box::new(entry.outbox.seal(self.generation, message));
            self.effects.push_back(Effect::WriteWorker { worker: worker.clone(), envelope, payload });
        }
    }

    fn send(&mut self, message: FromAgent) {
        self.send_with(self.generation, message, Vec::new());
    }

    fn send_with(&mut self, generation: Generation, message: FromAgent, payload: Vec<u8>) {
        let envelope = Box::new(self.outbox.seal(generation, message));
        self.effects.push_back(Effect::Send { envelope, payload });
    }
}

#[cfg(test)]
mod tests;
