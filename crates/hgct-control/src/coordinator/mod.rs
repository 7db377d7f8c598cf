//! The coordinator as a machine: events in, effects out; no clock, no sockets, no threads.
//!
//! # Driving it
//!
//! One thread owns the machine and an inbox of events:
//!
//! 1. `Coordinator::new(config, now)`.
//! 2. Take every [`Coordinator::poll_effect`] until `None`: write frames (queued a connection, never
//!    waited for), close connections, hand [`Update`]s to the driver.
//! 3. Wait for an event until [`Coordinator::poll_timeout`]; call [`Coordinator::handle`] with it,
//!    or with [`Event::Tick`] when the time is over. Go to 2.
//! 4. After [`Update::Ended`] nothing more comes: leave.
//!
//! The thread never waits for the driver: heartbeats would stop. A shell whose driver is behind
//! leaves frames where they are and says [`Event::Behind`] in place of a tick.
//!
//! `now` is a monotonic clock in nanoseconds. A listener runs [`crate::auth::Handshake`] on each
//! connection with a deadline of its own, gives it a number and sends [`Event::AgentJoined`], then
//! an [`Event::AgentMessage`] for each frame, last [`Event::AgentLost`]. The driver is whoever sends
//! [`Command`]s; it waits for the update that answers one before it sends the next (several
//! requests may be on their way side by side where their documentation does not say otherwise).
//!
//! # Phases
//!
//! ```text
//! Gathering ─► Session ─► Loading ─► Connecting ─► Restoring ─► Readying ─► Running ─► Finishing
//!                 ▲  discover, blobs, start, check, profile, links                        │
//!                 └───────────────────────────────────────────────────────────────────────┘
//! any ─► Ending ─► Ended
//! ```
//!
//! A worker that fails in Session is reported and ended, the run goes on. From Loading to Finishing
//! the failure of a worker of the plan ends the run; the loss of an agent always does.
//!
//! # Generations
//!
//! Each load (and each measurement of links) raises the generation. What a worker says of a plan
//! under an older generation is dropped. What agents say of processes (started, exited, heartbeats)
//! are facts of no generation.

mod api;
mod commands;
mod inquest;
mod outcome;
mod session;
mod steps;
mod training;

use std::collections::{BTreeMap, VecDeque};

use hgct_core::ids::{DeviceId, Generation, NodeId, Rank};

pub use api::{ClockOffset, Command, Config, ConnectionId, Effect, Event, LoadSpec, Update};
pub use outcome::{Failure, LostCause, Outcome, WorkerRef};

use inquest::Inquest;
use session::{Agent, Pending, Worker, WorkerState};
use steps::Clocks;
use training::Training;

use crate::detector::{Detector, Verdict};
use crate::message::{Envelope, FromAgent, ToAgent, ToWorker};

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Agents join.
    Gathering,
    /// All agents are there; workers start and answer; no plan runs.
    Session,
    /// Workers load their stages.
    Loading,
    /// Ranks connect.
    Connecting,
    /// Owners get their state; waits for [`Command::Start`].
    Restoring,
    /// Parameters are gathered.
    Readying,
    /// Steps.
    Running,
    /// Some ranks have finished.
    Finishing,
    /// Agents end their workers and leave.
    Ending,
    /// Over.
    Ended,
}

/// The machine. See the module for how to drive it.
#[derive(Debug)]
pub struct Coordinator {
    config: Config,
    phase: Phase,
    generation: Generation,
    /// Of the phases that have one.
    deadline_ns: Option<u64>,
    /// When the current phase began.
    since_ns: u64,
    last_ns: u64,
    next_heartbeat_ns: u64,
    agents: BTreeMap<NodeId, Agent>,
    connections: BTreeMap<ConnectionId, NodeId>,
    workers: BTreeMap<DeviceId, Worker>,
    pending: Vec<Pending>,
    training: Option<Training>,
    stop_requested: bool,
    detector: Detector,
    clocks: Clocks,
    inquest: Option<Inquest>,
    outcome: Option<Outcome>,
    effects: VecDeque<Effect>,
}

impl Coordinator {
    /// A coordinator that waits for its agents from now on.
    pub fn new(config: Config, now_ns: u64) -> Self {
        let deadline_ns = Some(now_ns.saturating_add(config.gather_ns));
        Self {
            phase: Phase::Gathering,
            generation: config.generation,
            deadline_ns,
            since_ns: now_ns,
            last_ns: now_ns,
            next_heartbeat_ns: now_ns,
            agents: BTreeMap::new(),
            connections: BTreeMap::new(),
            workers: BTreeMap::new(),
            pending: Vec::new(),
            training: None,
            stop_requested: false,
            detector: Detector::new(config.limits),
            clocks: Clocks::new(),
            inquest: None,
            outcome: None,
            effects: VecDeque::new(),
            config,
        }
    }

    /// Where the run stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The current generation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Takes what happened. Cheap; call it for every event.
    pub fn handle(&mut self, now_ns: u64, event: Event) {
        if self.phase == Phase::Ended {
            self.refuse_late(&event);
            return;
        }
        let now_ns = now_ns.max(self.last_ns);
        let gap_ns = now_ns - self.last_ns;
        self.last_ns = now_ns;
        // Ticks come at least every heartbeat; a longer gap is this process's own.
        if gap_ns > self.config.limits.suspect_ns || event == Event::Behind {
            self.detector.forgive(gap_ns);
        }
        match event {
            Event::AgentJoined { connection, node } => self.agent_joined(now_ns, connection, &node),
            Event::AgentMessage { connection, envelope, payload } => {
                self.agent_message(now_ns, connection, *envelope, payload);
            }
            Event::AgentLost { connection, cause } => {
                if let Some(node) = self.connections.get(&connection).cloned() {
                    self.lose_agent(now_ns, &node, cause);
                }
            }
            Event::Command { command } => self.command(now_ns, *command),
            Event::Tick | Event::Behind => {}
        }
        self.advance(now_ns);
    }

    /// What to do next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to call [`Self::handle`] with [`Event::Tick`] if nothing else happens. `None`: never,
    /// the run has ended.
    pub fn poll_timeout(&self) -> Option<u64> {
        if self.phase == Phase::Ended {
            return None;
        }
        let inquest = self.inquest.as_ref().map(|inquest| inquest.opened_ns + self.config.cause_ns);
        let pending = self.pending.iter().map(|pending| pending.deadline_ns);
        let verdict = self.detector.next_ns(self.last_ns).filter(|_| self.phase != Phase::Ending);
        [Some(self.next_heartbeat_ns), self.deadline_ns, verdict, inquest]
            .into_iter()
            .flatten()
            .chain(pending)
            .min()
    }

    /// What time alone brings: verdicts, deadlines, heartbeats.
    fn advance(&mut self, now_ns: u64) {
        if self.phase != Phase::Ending && self.phase != Phase::Ended {
            for verdict in self.detector.verdicts(now_ns) {
                self.verdict(now_ns, verdict);
            }
            self.settle(now_ns);
        }
        if self.deadline_ns.is_some_and(|deadline| now_ns >= deadline) {
            self.deadline(now_ns);
        }
        self.conclude(now_ns);
        if now_ns >= self.next_heartbeat_ns {
            self.next_heartbeat_ns = now_ns.saturating_add(self.config.limits.heartbeat_ns);
            for node in self.nodes() {
                self.send(&node, ToAgent::Heartbeat { now_ns });
            }
        }
        if self.phase == Phase::Ending && self.agents.is_empty() {
            self.finish();
        }
    }

    fn verdict(&mut self, now_ns: u64, verdict: Verdict) {
        match verdict {
            Verdict::AgentSuspect { .. } | Verdict::WorkerSuspect { .. } => {
                self.update(Update::Suspect { verdict });
            }
            Verdict::AgentDead { node, silent_ns, allowed_ns } => {
                self.lose_agent(now_ns, &node, LostCause::Silent { silent_ns, allowed_ns });
            }
            Verdict::WorkerDead { worker, silent_ns, allowed_ns } => {
                let worker = self.worker_ref(&worker);
                self.worker_failed(now_ns, Failure::WorkerSilent { worker, silent_ns, allowed_ns }, None);
            }
            Verdict::WorkerStalled { worker, stall } => {
                let worker = self.worker_ref(&worker);
                self.worker_failed(now_ns, Failure::WorkerStalled { worker, stall }, None);
            }
        }
    }

    fn deadline(&mut self, now_ns: u64) {
        self.deadline_ns = None;
        let waited_ns = now_ns - self.since_ns;
        match self.phase {
            Phase::Gathering => {
                let joined = self.nodes();
                let wanted = self.config.agents;
                self.fail(now_ns, Failure::TooFewAgents { wanted, joined, waited_ns });
            }
            Phase::Loading | Phase::Connecting | Phase::Readying => self.training_is_late(now_ns, waited_ns),
            Phase::Ending => self.finish(),
            _ => {}
        }
    }

    /// A worker cannot be used any more. Part of a plan: the run ends, after a look for the cause.
    /// Else it is ended, and whoever waits for it hears so.
    fn worker_failed(&mut self, now_ns: u64, failure: Failure, blames: Option<WorkerRef>) {
        let Some(device) = failure.worker().map(|worker| worker.device.clone()) else { return };
        if self.phase == Phase::Ending || self.phase == Phase::Ended {
            return;
        }
        if self.is_essential(&device) {
            self.inquest.get_or_insert_with(|| Inquest::open(now_ns)).add(failure, blames);
            return;
        }
        self.stop_workers(std::slice::from_ref(&device), &WorkerState::Failed);
        self.strike_worker(&device, &failure);
        self.update(Update::WorkerGone { worker: device, failure });
    }

    /// Ends the run with the root cause once it is clear, or the time for it is over.
    fn conclude(&mut self, now_ns: u64) {
        let due = |inquest: &Inquest| {
            inquest.is_decided() || now_ns >= inquest.opened_ns.saturating_add(self.config.cause_ns)
        };
        if !self.inquest.as_ref().is_some_and(due) {
            return;
        }
        if let Some((failure, also)) = self.inquest.take().and_then(Inquest::conclude) {
            let failure = Box::new(self.sharpen(now_ns, failure));
            let committed = self.training.as_ref().and_then(Training::committed);
            self.end(now_ns, Outcome::Failed { failure, also, committed });
        }
    }

    /// A worker that others cannot reach may have been quiet for a while, or its whole node.
    fn sharpen(&self, now_ns: u64, failure: Failure) -> Failure {
        let Failure::WorkerUnreachable { worker, .. } = &failure else { return failure };
        let limits = &self.config.limits;
        let late = |silence: &u64| *silence >= limits.suspect_ns;
        if let Some(silent_ns) = self.detector.agent_silence_ns(now_ns, &worker.node).filter(late) {
            let cause = LostCause::Silent { silent_ns, allowed_ns: limits.suspect_ns };
            let workers = self.workers_of(&worker.node);
            return Failure::AgentLost { node: worker.node.clone(), cause, workers };
        }
        match self.detector.worker_silence_ns(now_ns, &worker.device).filter(late) {
            Some(silent_ns) => {
                Failure::WorkerSilent { worker: worker.clone(), silent_ns, allowed_ns: limits.suspect_ns }
            }
            None => failure,
        }
    }

    fn fail(&mut self, now_ns: u64, failure: Failure) {
        let also = self.inquest.take().and_then(Inquest::conclude).map(|(first, mut also)| {
            also.insert(0, first);
            also
        });
        let committed = self.training.as_ref().and_then(Training::committed);
        let (failure, also) = (Box::new(failure), also.unwrap_or_default());
        self.end(now_ns, Outcome::Failed { failure, also, committed });
    }

    /// Ends the run: all agents end their workers and leave; those that do not answer are left
    /// behind (they end by themselves when they hear nothing).
    fn end(&mut self, now_ns: u64, outcome: Outcome) {
        if self.phase == Phase::Ending || self.phase == Phase::Ended {
            return;
        }
        let reason = outcome.to_string().lines().next().unwrap_or_default().to_owned();
        let grace_ns = self.config.grace_ns;
        for node in self.nodes() {
            self.send(&node, ToAgent::StopWorkers { workers: Vec::new(), grace_ns });
            self.send(&node, ToAgent::Shutdown { reason: reason.clone() });
        }
        self.pending.clear();
        self.inquest = None;
        self.outcome = Some(outcome);
        let deadline_ns = now_ns.saturating_add(grace_ns).saturating_add(self.config.leave_ns);
        self.enter(now_ns, Phase::Ending, Some(deadline_ns));
    }

    fn finish(&mut self) {
        let connections: Vec<ConnectionId> = self.connections.keys().copied().collect();
        for connection in connections {
            self.close(connection, "the run has ended");
        }
        self.agents.clear();
        self.connections.clear();
        self.workers.clear();
        self.deadline_ns = None;
        self.phase = Phase::Ended;
        if let Some(outcome) = self.outcome.take() {
            self.update(Update::Ended { outcome });
        }
    }

    fn refuse_late(&mut self, event: &Event) {
        if let Event::AgentJoined { connection, .. } = event {
            self.close(*connection, "the run has ended");
        }
    }

    fn enter(&mut self, now_ns: u64, phase: Phase, deadline_ns: Option<u64>) {
        self.phase = phase;
        self.since_ns = now_ns;
        self.deadline_ns = deadline_ns;
    }

    /// Whether a loaded plan cannot go on without the worker.
    fn is_essential(&self, device: &DeviceId) -> bool {
        let runs = matches!(
            self.phase,
            Phase::Loading
                | Phase::Connecting
                | Phase::Restoring
                | Phase::Readying
                | Phase::Running
                | Phase::Finishing
        );
        runs && self.training.as_ref().is_some_and(|training| training.rank(device).is_some())
    }

    fn worker_ref(&self, device: &DeviceId) -> WorkerRef {
        let node = self.workers.get(device).map(|worker| worker.node.clone());
        let rank = self
            .training
            .as_ref()
            .and_then(|training| training.rank(device).map(|rank| (rank, training.generation)));
        // A device's id begins with its node's name.
        let by_name = || device.as_str().split('/').next().and_then(|name| NodeId::new(name).ok());
        let unknown = || NodeId::new("unknown").unwrap_or_else(|_| unreachable!("a valid name"));
        WorkerRef { device: device.clone(), node: node.or_else(by_name).unwrap_or_else(unknown), rank }
    }

    fn workers_of(&self, node: &NodeId) -> Vec<WorkerRef> {
        let on_node = self.workers.iter().filter(|(_, worker)| worker.node == *node);
        on_node.map(|(device, _)| self.worker_ref(device)).collect()
    }

    fn rank_ref(&self, rank: Rank) -> Option<WorkerRef> {
        let device = self.training.as_ref()?.device(rank)?;
        Some(self.worker_ref(device))
    }

    fn nodes(&self) -> Vec<NodeId> {
        self.agents.keys().cloned().collect()
    }

    fn update(&mut self, update: Update) {
        self.effects.push_back(Effect::Update(Box::new(update)));
    }

    fn close(&mut self, connection: ConnectionId, reason: &str) {
        self.effects.push_back(Effect::Close { connection, reason: reason.into() });
    }

    fn send(&mut self, node: &NodeId, message: ToAgent) {
        self.send_with(node, message, Vec::new());
    }

    fn send_with(&mut self, node: &NodeId, message: ToAgent, payload: Vec<u8>) {
        if let Some(agent) = self.agents.get_mut(node) {
            let envelope = Box::new(agent.outbox.seal(self.generation, message));
            self.effects.push_back(Effect::Send { connection: agent.connection, envelope, payload });
        }
    }

    fn send_worker(&mut self, device: &DeviceId, message: ToWorker, payload: Vec<u8>) {
        if let Some(node) = self.workers.get(device).map(|worker| worker.node.clone()) {
            self.send_with(&node, ToAgent::Forward { worker: device.clone(), message }, payload);
        }
    }

    fn reject(&mut self, command: &str, reason: impl Into<String>) {
        self.update(Update::Rejected { command: command.into(), reason: reason.into() });
    }

    fn agent_message(
        &mut self,
        now_ns: u64,
        connection: ConnectionId,
        envelope: Envelope<FromAgent>,
        payload: Vec<u8>,
    ) {
        let Some(node) = self.connections.get(&connection).cloned() else { return };
        let Some(agent) = self.agents.get_mut(&node) else { return };
        if let Err(error) = agent.inbox.admit(&envelope) {
            self.break_off(now_ns, &node, error.to_string());
            return;
        }
        if envelope.generation > self.generation {
            let message = format!("a message of {}, which has not begun", envelope.generation);
            self.break_off(now_ns, &node, message);
            return;
        }
        self.detector.agent_heard(now_ns, &node);
        match envelope.message {
            FromAgent::Forward { worker, message } => {
                self.worker_message(now_ns, &node, envelope.generation, worker, message, payload);
            }
            message => self.agent_says(now_ns, &node, message),
        }
    }

    /// The agent broke the protocol.
    fn break_off(&mut self, now_ns: u64, node: &NodeId, message: String) {
        self.lose_agent(now_ns, node, LostCause::Protocol { message });
    }
}
