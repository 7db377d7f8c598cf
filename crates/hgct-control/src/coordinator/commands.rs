//! Commands of the driver: what fits the phase is carried out, the rest is answered with a reason.

use std::collections::{BTreeMap, BTreeSet};

use hgct_core::canonical::Hash;
use hgct_core::ids::{DeviceId, NodeId};

use super::outcome::Outcome;
use super::session::{Party, Pending, What, Worker, WorkerState};
use super::{Command, Coordinator, Phase};
use crate::message::{ToAgent, ToWorker, WorkerStart};

impl Coordinator {
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

/// A command's name in [`super::Update::Rejected`].
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
