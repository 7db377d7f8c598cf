//! Agents and workers before and between plans: who is there, and who still owes an answer.

use std::collections::{BTreeMap, BTreeSet};

use hgct_core::canonical::Hash;
use hgct_core::cluster::NodeSpec;
use hgct_core::ids::{DeviceId, Generation, NodeId, Rank};
use hgct_core::profile::LinkProfile;

use super::inquest::Inquest;
use super::outcome::{Failure, LostCause, Outcome};
use super::{Command, ConnectionId, Coordinator, Phase, Update};
use crate::frame::{Inbox, Outbox};
use crate::message::{
    EndpointSpec, Exit, FromAgent, FromWorker, PeerSpec, ToAgent, ToWorker, UnusableDevice, WorkerStart,
};

/// A connected agent.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) connection: ConnectionId,
    pub(super) inbox: Inbox,
    pub(super) outbox: Outbox,
    pub(super) has_joined: bool,
}

/// A worker's process.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) node: NodeId,
    pub(super) state: WorkerState,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum WorkerState {
    /// Imports its engine.
    Starting,
    /// Takes commands.
    Ready { endpoints: Vec<EndpointSpec> },
    /// Has failed, was reported, and is being ended.
    Failed,
    /// Is being ended because the driver wants so.
    Stopping,
}

/// An answer that is owed.
#[derive(Debug)]
pub(super) struct Pending {
    what: What,
    waiting: BTreeSet<Party>,
    failed: Vec<(DeviceId, Failure)>,
    pub(super) deadline_ns: u64,
    allowed_ns: u64,
}

#[derive(Debug)]
enum What {
    Inventory {
        rows: BTreeMap<NodeId, (NodeSpec, Vec<UnusableDevice>)>,
    },
    Blobs,
    Start {
        workers: Vec<DeviceId>,
    },
    Stop {
        workers: Vec<DeviceId>,
    },
    Grants {
        rows: BTreeMap<NodeId, (bool, String)>,
    },
    /// `any`: one answer is enough.
    Ask {
        any: bool,
    },
    Links {
        generation: Generation,
        workers: Vec<DeviceId>,
        measuring: bool,
        links: Vec<LinkProfile>,
    },
}

/// Who owes the answer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Party {
    Node(NodeId),
    Blob(NodeId, Hash),
    Worker(DeviceId),
}

impl Pending {
    fn waits_for(&self, device: &DeviceId) -> bool {
        self.waiting.contains(&Party::Worker(device.clone()))
    }

    fn name(&self) -> &'static str {
        match self.what {
            What::Inventory { .. } => "discover",
            What::Blobs => "offer-blobs",
            What::Start { .. } => "start",
            What::Stop { .. } => "stop",
            What::Grants { .. } => "hold-grants",
            What::Ask { .. } => "the request",
            What::Links { measuring: false, .. } => "connect",
            What::Links { measuring: true, .. } => "measure-links",
        }
    }
}

impl Coordinator {
    pub(super) fn agent_joined(&mut self, now_ns: u64, connection: ConnectionId, node: &NodeId) {
        let run = self.config.run.clone();
        let mut agent =
            Agent { connection, inbox: Inbox::new(run.clone()), outbox: Outbox::new(run), has_joined: false };
        let refusal = if self.phase != Phase::Gathering {
            Some("all agents of this run are there already".to_owned())
        } else if self.agents.contains_key(node) {
            Some(format!("an agent of node {node} is there already: give each agent its own --name"))
        } else {
            None
        };
        if let Some(reason) = refusal {
            let message = ToAgent::Shutdown { reason: reason.clone() };
            let envelope = Box::new(agent.outbox.seal(self.generation, message));
            self.effects.push_back(super::Effect::Send { connection, envelope, payload: Vec::new() });
            self.close(connection, &reason);
            return;
        }
        self.agents.insert(node.clone(), agent);
        self.connections.insert(connection, node.clone());
        self.detector.agent_heard(now_ns, node);
        let limits = &self.config.limits;
        let (heartbeat_ns, dead_after_ns) = (limits.heartbeat_ns, limits.dead_ns);
        self.send(node, ToAgent::Welcome { heartbeat_ns, dead_after_ns });
    }

    pub(super) fn lose_agent(&mut self, now_ns: u64, node: &NodeId, cause: LostCause) {
        let workers = self.workers_of(node);
        let Some(agent) = self.agents.remove(node) else { return };
        self.connections.remove(&agent.connection);
        self.close(agent.connection, &cause.to_string());
        self.detector.forget_agent(node);
        for worker in &workers {
            self.workers.remove(&worker.device);
            self.detector.forget_worker(&worker.device);
        }
        self.update(Update::AgentGone { node: node.clone(), cause: cause.clone() });
        if !matches!(self.phase, Phase::Gathering | Phase::Ending | Phase::Ended) {
            let failure = Failure::AgentLost { node: node.clone(), cause, workers };
            self.inquest.get_or_insert_with(|| Inquest::open(now_ns)).add(failure, None);
        }
    }

    /// What an agent says of itself and of processes.
    pub(super) fn agent_says(&mut self, now_ns: u64, node: &NodeId, message: FromAgent) {
        match message {
            FromAgent::Join { node: named, .. } if named == *node => self.agent_has_joined(now_ns, node),
            FromAgent::Join { node: named, .. } => {
                self.break_off(now_ns, node, format!("it calls itself {named}, but proved to be {node}"));
            }
            // Beats come forwarded, each with its generation; those in here repeat them.
            FromAgent::Heartbeat { memory_bytes, .. } => {
                self.update(Update::AgentAlive { node: node.clone(), memory_bytes });
            }
            FromAgent::Inventory { node: found, unusable } if found.name == *node => {
                self.answer_of_node(node, |what| match what {
                    What::Inventory { rows } => {
                        rows.insert(node.clone(), (found.clone(), unusable.clone()));
                        true
                    }
                    _ => false,
                });
            }
            FromAgent::Inventory { node: found, .. } => {
                self.break_off(now_ns, node, format!("an inventory of node {}", found.name));
            }
            FromAgent::GrantsHeld { isolated, message } => self.answer_of_node(node, |what| match what {
                What::Grants { rows } => {
                    rows.insert(node.clone(), (isolated, message.clone()));
                    true
                }
                _ => false,
            }),
            FromAgent::BlobState { hash, complete, size_bytes } => {
                self.blob_state(node, hash, complete, size_bytes);
            }
            FromAgent::WorkerStarted { .. } | FromAgent::Forward { .. } => {}
            FromAgent::WorkerExited { worker, exit, log_tail } => {
                self.worker_exited(now_ns, node, &worker, exit, log_tail);
            }
            FromAgent::Log { worker, text } => self.update(Update::Log { worker, text }),
            FromAgent::Leaving { reason } => self.lose_agent(now_ns, node, LostCause::Left { reason }),
        }
    }

    fn agent_has_joined(&mut self, now_ns: u64, node: &NodeId) {
        let Some(agent) = self.agents.get_mut(node) else { return };
        if agent.has_joined || self.phase != Phase::Gathering {
            return;
        }
        agent.has_joined = true;
        let joined = self.agents.values().filter(|agent| agent.has_joined).count();
        let wanted = self.config.agents;
        self.update(Update::AgentJoined { node: node.clone(), joined, wanted });
        if joined >= wanted {
            self.enter(now_ns, Phase::Session, None);
            let nodes = self.nodes();
            self.update(Update::Gathered { nodes });
        }
    }

    fn blob_state(&mut self, node: &NodeId, hash: Hash, complete: bool, size_bytes: u64) {
        let party = Party::Blob(node.clone(), hash.clone());
        if !self.pending.iter().any(|pending| pending.waiting.contains(&party)) {
            return;
        }
        if complete {
            for pending in &mut self.pending {
                pending.waiting.remove(&party);
            }
        } else {
            self.update(Update::BlobNeeded { node: node.clone(), hash, offset: size_bytes });
        }
    }

    fn answer_of_node(&mut self, node: &NodeId, mut take: impl FnMut(&mut What) -> bool) {
        for pending in &mut self.pending {
            let party = Party::Node(node.clone());
            if pending.waiting.contains(&party) && take(&mut pending.what) {
                pending.waiting.remove(&party);
            }
        }
    }

    fn worker_exited(&mut self, now_ns: u64, node: &NodeId, device: &DeviceId, exit: Exit, log_tail: String) {
        if self.workers.get(device).is_none_or(|worker| worker.node != *node) {
            return;
        }
        let worker = self.worker_ref(device);
        let state = self.workers.remove(device).map(|worker| worker.state);
        self.detector.forget_worker(device);
        self.clocks.remove(device);
        let failure = Failure::WorkerExited { worker, exit, log_tail };
        match state {
            Some(WorkerState::Failed) | None => {}
            Some(WorkerState::Stopping) => self.strike_worker(device, &failure),
            Some(_) => self.worker_failed(now_ns, failure, None),
        }
        for pending in &mut self.pending {
            if matches!(pending.what, What::Stop { .. }) {
                pending.waiting.remove(&Party::Worker(device.clone()));
            }
        }
    }

    /// Whoever waits for the worker need not any more.
    pub(super) fn strike_worker(&mut self, device: &DeviceId, failure: &Failure) {
        for pending in &mut self.pending {
            let is_stop = matches!(pending.what, What::Stop { .. });
            if !is_stop && pending.waiting.remove(&Party::Worker(device.clone())) {
                pending.failed.push((device.clone(), failure.clone()));
            }
        }
    }

    /// Asks agents to end workers that are there and not being ended yet.
    pub(super) fn stop_workers(&mut self, devices: &[DeviceId], state: &WorkerState) {
        let mut by_node: BTreeMap<NodeId, Vec<DeviceId>> = BTreeMap::new();
        for device in devices {
            let Some(worker) = self.workers.get_mut(device) else { continue };
            if !matches!(worker.state, WorkerState::Failed | WorkerState::Stopping) {
                worker.state = state.clone();
                by_node.entry(worker.node.clone()).or_default().push(device.clone());
            }
            self.detector.forget_worker(device);
        }
        let grace_ns = self.config.grace_ns;
        for (node, workers) in by_node {
            self.send(&node, ToAgent::StopWorkers { workers, grace_ns });
        }
    }

    /// Answers whatever is complete or late.
    pub(super) fn settle(&mut self, now_ns: u64) {
        loop {
            let due = |pending: &Pending| pending.waiting.is_empty() || now_ns >= pending.deadline_ns;
            let Some(index) = self.pending.iter().position(due) else { return };
            let pending = self.pending.remove(index);
            self.settle_one(now_ns, pending);
        }
    }

    fn settle_one(&mut self, now_ns: u64, mut pending: Pending) {
        let mut nodes = Vec::new();
        let mut blobs = Vec::new();
        for party in std::mem::take(&mut pending.waiting) {
            match party {
                Party::Node(node) => nodes.push(node),
                Party::Blob(node, hash) => blobs.push((node, hash)),
                Party::Worker(_) if matches!(pending.what, What::Stop { .. }) => {}
                Party::Worker(device) => {
                    let workers = vec![self.worker_ref(&device)];
                    let what = pending.name().into();
                    let failure = Failure::Deadline { what, workers, allowed_ns: pending.allowed_ns };
                    pending.failed.push((device, failure.clone()));
                    self.worker_failed(now_ns, failure, None);
                }
            }
        }
        let failed = pending.failed;
        let has_failed = |device: &DeviceId| failed.iter().any(|(bad, _)| bad == device);
        let update = match pending.what {
            What::Inventory { rows } => {
                Update::Inventory { nodes: rows.into_values().collect(), missing: nodes }
            }
            What::Blobs => Update::BlobsHeld { missing: blobs },
            What::Grants { rows } => Update::GrantsHeld { nodes: rows, missing: nodes },
            What::Start { workers } => {
                let ready = workers.into_iter().filter(|device| !has_failed(device)).collect();
                Update::WorkersStarted { ready, failed }
            }
            What::Stop { workers } => Update::WorkersStopped { workers },
            What::Ask { .. } => Update::Answered { failed },
            What::Links { generation, workers, measuring: false, links } if failed.is_empty() => {
                for device in &workers {
                    self.send_worker(device, ToWorker::MeasureLinks, Vec::new());
                }
                let waiting = workers.iter().cloned().map(Party::Worker).collect();
                let what = What::Links { generation, workers, measuring: true, links };
                self.pending.push(Pending { what, waiting, failed, ..pending });
                return;
            }
            What::Links { links, .. } => Update::LinksMeasured { links, failed },
        };
        self.update(update);
    }

    /// What a worker says outside of a plan. `None`: it was for here.
    pub(super) fn session_message(
        &mut self,
        generation: Generation,
        device: &DeviceId,
        message: FromWorker,
    ) -> Option<FromWorker> {
        match message {
            FromWorker::Hello { description, endpoints } => {
                if let Some(worker) = self.workers.get_mut(device)
                    && worker.state == WorkerState::Starting
                {
                    worker.state = WorkerState::Ready { endpoints };
                    self.answer_of_worker(device, |what| matches!(what, What::Start { .. }));
                    self.update(Update::WorkerReady { worker: device.clone(), description });
                }
                None
            }
            FromWorker::Checked { .. }
            | FromWorker::Profiled { .. }
            | FromWorker::TrainedAlone { .. }
            | FromWorker::Generated { .. } => {
                if self.answer_of_worker(device, |what| matches!(what, What::Ask { .. })) {
                    self.update(Update::Answer { worker: device.clone(), answer: message });
                }
                None
            }
            FromWorker::Connected if self.training.as_ref().is_none_or(|t| t.generation != generation) => {
                self.answer_of_worker(
                    device,
                    |what| matches!(what, What::Links { generation: g, measuring: false, .. } if *g == generation),
                );
                None
            }
            FromWorker::LinksMeasured { links: measured } => {
                self.answer_of_worker(device, |what| match what {
                    What::Links { generation: g, measuring: true, links, .. } if *g == generation => {
                        links.extend(measured.iter().cloned());
                        true
                    }
                    _ => false,
                });
                None
            }
            message => Some(message),
        }
    }

    fn answer_of_worker(&mut self, device: &DeviceId, mut take: impl FnMut(&mut What) -> bool) -> bool {
        let party = Party::Worker(device.clone());
        let mut taken = false;
        for pending in &mut self.pending {
            if pending.waiting.contains(&party) && take(&mut pending.what) {
                pending.waiting.remove(&party);
                if matches!(pending.what, What::Ask { any: true }) {
                    pending.waiting.clear();
                }
                taken = true;
            }
        }
        taken
    }

    /// The device of a rank while links are measured.
    pub(super) fn links_peer(&self, generation: Generation, rank: Rank) -> Option<DeviceId> {
        self.pending.iter().find_map(|pending| match &pending.what {
            What::Links { generation: g, workers, .. } if *g == generation => {
                workers.get(rank.index()).cloned()
            }
            _ => None,
        })
    }

    /// Whether the worker takes a new request.
    pub(super) fn idle(&self, device: &DeviceId) -> Result<(), String> {
        let busy = self.pending.iter().find(|pending| pending.waits_for(device));
        match (self.workers.get(device), busy) {
            (None, _) => Err(format!("worker {device} is not there: start it, or plan without it")),
            (Some(Worker { state: WorkerState::Ready { .. }, .. }), None) => Ok(()),
            (Some(_), Some(pending)) => {
                Err(format!("worker {device} still owes its answer to {}", pending.name()))
            }
            (Some(_), None) => Err(format!("worker {device} is not ready")),
        }
    }

    /// In the order of the devices: where each is reached.
    pub(super) fn peers(&self, devices: &[DeviceId]) -> Vec<PeerSpec> {
        let peer = |(rank, device): (Rank, &DeviceId)| {
            let worker = self.workers.get(device)?;
            let WorkerState::Ready { endpoints } = &worker.state else { return None };
            let (node, endpoints) = (worker.node.clone(), endpoints.clone());
            Some(PeerSpec { rank, device: device.clone(), node, endpoints })
        };
        (0..).map(Rank).zip(devices).filter_map(peer).collect()
    }

    pub(super) fn command(&mut self, now_ns: u64, command: Command) {
        match command {
            Command::Stop => self.stop(now_ns),
            Command::End if self.stop_requested => {
                let step = self.training.as_ref().and_then(super::Training::committed);
                self.end(now_ns, Outcome::Stopped { step });
            }
            Command::End => self.end(now_ns, Outcome::Completed),
            Command::Abort { reason } => self.end(now_ns, Outcome::Aborted { reason }),
            command if matches!(self.phase, Phase::Gathering | Phase::Ending | Phase::Ended) => {
                let reason = if self.phase == Phase::Gathering {
                    "agents are still joining: wait for them"
                } else {
                    "the run is ending"
                };
                self.reject(name(&command), reason);
            }
            Command::BlobChunk { node, hash, offset, bytes } => {
                self.send_with(&node, ToAgent::BlobChunk { hash, offset }, bytes);
            }
            Command::OfferBlobs { blobs, nodes, deadline_ns } => {
                self.offer_blobs(now_ns, &blobs, nodes, deadline_ns);
            }
            Command::HoldGrants { deadline_ns } => {
                let what = What::Grants { rows: BTreeMap::new() };
                self.ask_nodes(now_ns, &ToAgent::HoldGrants, what, deadline_ns);
            }
            Command::State { rank, slice, role, bytes } => self.state(rank, slice, role, bytes),
            Command::Start { step, num_updates, end_step, deadline_ns } => {
                self.start(now_ns, step, num_updates, end_step, deadline_ns);
            }
            command if self.phase != Phase::Session => {
                let reason = format!("a plan is in phase {:?}: wait for its end", self.phase);
                self.reject(name(&command), reason);
            }
            Command::Discover { deadline_ns } => {
                let what = What::Inventory { rows: BTreeMap::new() };
                self.ask_nodes(now_ns, &ToAgent::Discover, what, deadline_ns);
            }
            Command::StartWorkers { workers, deadline_ns } => {
                self.start_workers(now_ns, workers, deadline_ns);
            }
            Command::StopWorkers { workers } => self.stop_and_wait(now_ns, workers),
            Command::Ask { requests, deadline_ns } => self.ask(now_ns, requests, deadline_ns),
            Command::MeasureLinks { workers, deadline_ns } => {
                self.measure_links(now_ns, workers, deadline_ns);
            }
            Command::Load(spec) => self.load(now_ns, &spec),
        }
    }

    fn owe(&mut self, now_ns: u64, what: What, waiting: BTreeSet<Party>, allowed_ns: u64) {
        let deadline_ns = now_ns.saturating_add(allowed_ns);
        self.pending.push(Pending { what, waiting, failed: Vec::new(), deadline_ns, allowed_ns });
    }

    fn ask_nodes(&mut self, now_ns: u64, message: &ToAgent, what: What, allowed_ns: u64) {
        let nodes = self.nodes();
        for node in &nodes {
            self.send(node, message.clone());
        }
        self.owe(now_ns, what, nodes.into_iter().map(Party::Node).collect(), allowed_ns);
    }

    fn offer_blobs(&mut self, now_ns: u64, blobs: &[(Hash, u64)], nodes: Vec<NodeId>, allowed_ns: u64) {
        let nodes = if nodes.is_empty() { self.nodes() } else { nodes };
        if let Some(node) = nodes.iter().find(|node| !self.agents.contains_key(*node)) {
            self.reject("offer-blobs", format!("node {node} has no agent"));
            return;
        }
        let mut waiting = BTreeSet::new();
        for node in &nodes {
            for (hash, size_bytes) in blobs {
                self.send(node, ToAgent::Blob { hash: hash.clone(), size_bytes: *size_bytes });
                waiting.insert(Party::Blob(node.clone(), hash.clone()));
            }
        }
        self.owe(now_ns, What::Blobs, waiting, allowed_ns);
    }

    fn start_workers(&mut self, now_ns: u64, workers: Vec<(NodeId, WorkerStart)>, allowed_ns: u64) {
        let mut by_node: BTreeMap<NodeId, Vec<WorkerStart>> = BTreeMap::new();
        let mut devices: Vec<DeviceId> = Vec::new();
        for (node, start) in workers {
            let twice = devices.contains(&start.device) || self.workers.contains_key(&start.device);
            if twice || !self.agents.contains_key(&node) {
                let why = if twice { "runs already: stop it first" } else { "is on a node without an agent" };
                self.reject("start-workers", format!("worker {} {why}", start.device));
                return;
            }
            devices.push(start.device.clone());
            by_node.entry(node).or_default().push(start);
        }
        for (node, starts) in by_node {
            for start in &starts {
                let worker = Worker { node: node.clone(), state: WorkerState::Starting };
                self.workers.insert(start.device.clone(), worker);
            }
            self.send(&node, ToAgent::StartWorkers { workers: starts });
        }
        let waiting = devices.iter().cloned().map(Party::Worker).collect();
        self.owe(now_ns, What::Start { workers: devices }, waiting, allowed_ns);
    }

    fn stop_and_wait(&mut self, now_ns: u64, workers: Vec<DeviceId>) {
        let known: Vec<DeviceId> = self.workers.keys().cloned().collect();
        let workers = if workers.is_empty() { known } else { workers };
        self.stop_workers(&workers, &WorkerState::Stopping);
        let there = workers.iter().filter(|device| self.workers.contains_key(*device));
        let waiting = there.cloned().map(Party::Worker).collect();
        let allowed_ns = self.config.grace_ns.saturating_add(self.config.leave_ns);
        self.owe(now_ns, What::Stop { workers }, waiting, allowed_ns);
    }

    fn ask(&mut self, now_ns: u64, requests: Vec<(DeviceId, ToWorker)>, allowed_ns: u64) {
        if let Some(reason) = requests.iter().find_map(|(device, _)| self.idle(device).err()) {
            self.reject("ask", reason);
            return;
        }
        let waiting = requests.iter().map(|(device, _)| Party::Worker(device.clone())).collect();
        // All ranks continue a prompt together; the one with the head answers.
        let any = requests.iter().all(|(_, message)| matches!(message, ToWorker::Generate { .. }));
        for (device, message) in requests {
            self.send_worker(&device, message, Vec::new());
        }
        self.owe(now_ns, What::Ask { any }, waiting, allowed_ns);
    }

    fn measure_links(&mut self, now_ns: u64, workers: Vec<DeviceId>, allowed_ns: u64) {
        if let Some(reason) = workers.iter().find_map(|device| self.idle(device).err()) {
            self.reject("measure-links", reason);
            return;
        }
        self.generation = self.generation.next();
        let peers = self.peers(&workers);
        for device in &workers {
            let message = ToWorker::Connect { peers: peers.clone(), deadline_ns: allowed_ns };
            self.send_worker(device, message, Vec::new());
        }
        let waiting = workers.iter().cloned().map(Party::Worker).collect();
        let generation = self.generation;
        let what = What::Links { generation, workers, measuring: false, links: Vec::new() };
        self.owe(now_ns, what, waiting, allowed_ns);
    }
}

/// A command's name in [`Update::Rejected`].
fn name(command: &Command) -> &'static str {
    match command {
        Command::Discover { .. } => "discover",
        Command::OfferBlobs { .. } => "offer-blobs",
        Command::BlobChunk { .. } => "blob-chunk",
        Command::StartWorkers { .. } => "start-workers",
        Command::StopWorkers { .. } => "stop-workers",
        Command::HoldGrants { .. } => "hold-grants",
        Command::Ask { .. } => "ask",
        Command::MeasureLinks { .. } => "measure-links",
        Command::Load(_) => "load",
        Command::State { .. } => "state",
        Command::Start { .. } => "start",
        Command::Stop => "stop",
        Command::End => "end",
        Command::Abort { .. } => "abort",
    }
}
