//! Agents and workers before and between plans: who is there, and who still owes an answer.

use std::collections::{BTreeMap, BTreeSet};

use hgct_core::canonical::Hash;
use hgct_core::cluster::NodeSpec;
use hgct_core::ids::{DeviceId, Generation, NodeId, Rank};
use hgct_core::profile::LinkProfile;

use super::inquest::Inquest;
use super::outcome::{Failure, LostCause};
use super::{ConnectionId, Coordinator, Phase, Update};
use crate::frame::{Inbox, Outbox};
use crate::message::{
    EndpointSpec, Exit, FromAgent, FromWorker, PeerSpec, ToAgent, ToWorker, UnusableDevice,
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
    pub(super) what: What,
    pub(super) waiting: BTreeSet<Party>,
    pub(super) failed: Vec<(DeviceId, Failure)>,
    pub(super) deadline_ns: u64,
    pub(super) allowed_ns: u64,
}

#[derive(Debug)]
pub(super) enum What {
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
pub(super) enum Party {
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
}
