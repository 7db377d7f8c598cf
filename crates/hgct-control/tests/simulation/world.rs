//! The world: virtual time, a network that delays, holds and breaks, nodes, processes, a driver.

use std::collections::BTreeMap;

use hgct_control::agent::{self, Agent};
use hgct_control::auth::{Key, Token};
use hgct_control::coordinator::{
    Config, ConnectionId, Coordinator, Effect, Event, LostCause, Outcome, Phase, Update,
};
use hgct_control::detector::Limits;
use hgct_control::message::{Envelope, Exit, FromWorker, ToWorker};
use hgct_core::cluster::{Isolation, NodeSpec};
use hgct_core::ids::{DeviceId, Generation, NodeId, Rank, RunId};

use crate::driver::Driver;
use crate::random::Random;
use crate::scenario::{Fault, Scenario};
use crate::worker::{Group, Process};

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1000 * MS;
/// A step waits this long for its peers inside of a worker.
pub(crate) const STEP_DEADLINE: u64 = 10 * SECOND;
pub(crate) const FOR_EVER: u64 = u64::MAX / 4;

pub(crate) enum Happening {
    Coordinator(Event),
    Agent(NodeId, agent::Event),
    Order(DeviceId, Box<Envelope<ToWorker>>),
    Worker(DeviceId, Do),
    Fault(usize),
    ResumeAgent(NodeId),
    ResumeCoordinator,
    Regroup,
}

pub(crate) enum Do {
    Beat,
    Say(Generation, Box<FromWorker>),
    Connected,
    StepDone(u64),
    Evaluated,
    Blame,
    BlameHung(Rank),
    Exit(Exit),
}

pub(crate) struct Node {
    pub(crate) agent: Option<Agent>,
    /// The agent's process is stopped; what comes waits.
    pub(crate) hung: bool,
    pub(crate) backlog: Vec<agent::Event>,
    pub(crate) connection: ConnectionId,
    pub(crate) connected: bool,
    pub(crate) last_up: u64,
    pub(crate) last_down: u64,
    /// The network holds everything of this node until then.
    pub(crate) held_until: u64,
}

pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) scenario: Scenario,
    pub(crate) random: Random,
    pub(crate) queue: BTreeMap<(u64, u64), Happening>,
    pub(crate) sequence: u64,
    pub(crate) run: RunId,
    pub(crate) coordinator: Option<Coordinator>,
    pub(crate) coordinator_paused: bool,
    /// Its shell takes no frames, but lets time pass.
    pub(crate) coordinator_behind: bool,
    pub(crate) coordinator_backlog: Vec<Event>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) processes: BTreeMap<DeviceId, Process>,
    pub(crate) pipes: BTreeMap<DeviceId, u64>,
    pub(crate) groups: BTreeMap<Generation, Group>,
    pub(crate) running: BTreeMap<Generation, u64>,
    pub(crate) stop_after: BTreeMap<Generation, u64>,
    pub(crate) driver: Driver,
    pub(crate) last_command: u64,
    /// Every event with its time, as a log would hold it.
    pub(crate) log: Vec<(u64, String)>,
    pub(crate) updates: Vec<(u64, Update)>,
    pub(crate) ending_ns: Option<u64>,
    pub(crate) ended: Option<(u64, Outcome)>,
    /// Faults that hit something: when, what.
    pub(crate) hits: Vec<(u64, Fault)>,
    /// When the last process or agent was gone.
    pub(crate) last_alive_ns: u64,
}

pub(crate) fn config(run: RunId, agents: usize) -> Config {
    let limits = Limits { warming_ns: 12 * SECOND, ..Limits::default() };
    Config { limits, ..Config::new(run, agents, 8 * SECOND) }
}

impl World {
    pub(crate) fn new(scenario: Scenario) -> Self {
        let run = RunId::new("run-1").unwrap();
        let coordinator = Coordinator::new(config(run.clone(), scenario.nodes.len()), 0);
        let mut world = Self {
            now: 0,
            random: Random(scenario.seed ^ 0xabcd),
            queue: BTreeMap::new(),
            sequence: 0,
            run,
            coordinator: Some(coordinator),
            coordinator_paused: false,
            coordinator_behind: false,
            coordinator_backlog: Vec::new(),
            nodes: BTreeMap::new(),
            processes: BTreeMap::new(),
            pipes: BTreeMap::new(),
            groups: BTreeMap::new(),
            running: BTreeMap::new(),
            stop_after: BTreeMap::new(),
            driver: Driver::new(&scenario),
            last_command: 0,
            log: Vec::new(),
            updates: Vec::new(),
            ending_ns: None,
            ended: None,
            hits: Vec::new(),
            last_alive_ns: 0,
            scenario,
        };
        for (number, name) in (0..).zip(world.scenario.nodes.clone()) {
            let connection = ConnectionId(number);
            let token = Token::from_random(&[1; 32]);
            let config = agent::Config {
                run: world.run.clone(),
                node: name.clone(),
                pid: 1,
                memory_bytes: 1,
                data_key: Key::data(&token, &world.run),
                blobs: "blobs".into(),
                listen: Vec::new(),
                advertise: Vec::new(),
            };
            let node = Node {
                agent: Some(Agent::new(config, 0)),
                hung: false,
                backlog: Vec::new(),
                connection,
                connected: true,
                last_up: 0,
                last_down: 0,
                held_until: 0,
            };
            world.nodes.insert(name.clone(), node);
            world.up(&name, Event::AgentJoined { connection, node: name.clone() });
            world.agent_effects(&name);
        }
        for (index, fault) in world.scenario.faults.clone().iter().enumerate() {
            world.at(fault.at_ns, Happening::Fault(index));
        }
        world
    }

    /// Runs until nothing happens any more, or too long.
    pub(crate) fn run(&mut self) {
        for _ in 0..200_000 {
            let next = self.queue.first_key_value().map(|(key, _)| key.0);
            let coordinator =
                self.coordinator.as_ref().filter(|_| !self.coordinator_paused || self.coordinator_behind);
            let timeout = coordinator.and_then(Coordinator::poll_timeout);
            let nodes = self.nodes.iter().filter(|(_, node)| !node.hung);
            let agent = nodes
                .filter_map(|(name, node)| Some((node.agent.as_ref()?.poll_timeout()?, name.clone())))
                .min();
            let agent_ns = agent.as_ref().map(|(at, _)| *at);
            let Some(at) = [next, timeout, agent_ns].into_iter().flatten().min() else { return };
            if at > 200 * SECOND {
                return;
            }
            self.now = self.now.max(at);
            if next == Some(at) {
                let Some((_, happening)) = self.queue.pop_first() else { return };
                self.happen(happening);
            } else if timeout == Some(at) {
                self.coordinator_event(if self.coordinator_behind { Event::Behind } else { Event::Tick });
            } else if let Some((_, name)) = agent {
                self.agent_event(&name, agent::Event::Tick { memory_bytes: 1 });
            }
        }
        panic!("seed {}: no end after 200,000 events, at {} ms", self.scenario.seed, self.now / MS);
    }

    pub(crate) fn at(&mut self, at_ns: u64, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((at_ns.max(self.now), self.sequence), happening);
    }

    pub(crate) fn after(&mut self, low_ns: u64, high_ns: u64, happening: Happening) {
        let at = self.now + self.random.range(low_ns, high_ns);
        self.at(at, happening);
    }

    pub(crate) fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Coordinator(event) => self.coordinator_event(event),
            Happening::Agent(node, event) => self.agent_event(&node, event),
            Happening::Order(device, envelope) => self.order(&device, *envelope),
            Happening::Worker(device, what) => self.work(&device, what),
            Happening::Fault(index) => self.fault(index),
            Happening::ResumeAgent(name) => {
                let Some(node) = self.nodes.get_mut(&name) else { return };
                node.hung = false;
                for event in std::mem::take(&mut node.backlog) {
                    self.agent_event(&name, event);
                }
            }
            Happening::ResumeCoordinator => {
                self.coordinator_paused = false;
                self.coordinator_behind = false;
                for event in std::mem::take(&mut self.coordinator_backlog) {
                    self.coordinator_event(event);
                }
            }
            Happening::Regroup => {
                let generations: Vec<Generation> = self.groups.keys().copied().collect();
                for generation in generations {
                    self.try_step(generation);
                }
            }
        }
    }

    // Coordinator and network.

    pub(crate) fn coordinator_event(&mut self, event: Event) {
        if self.coordinator_paused && event != Event::Behind {
            self.coordinator_backlog.push(event);
            return;
        }
        let Some(machine) = &mut self.coordinator else { return };
        self.log.push((self.now, serde_json::to_string(&event).unwrap()));
        machine.handle(self.now, event);
        if machine.phase() == Phase::Ending && self.ending_ns.is_none() {
            self.ending_ns = Some(self.now);
        }
        while let Some(effect) = self.coordinator.as_mut().and_then(Coordinator::poll_effect) {
            match effect {
                Effect::Send { connection, envelope, payload } => {
                    if let Some(name) = self.node_of(connection) {
                        self.down(&name, agent::Event::Message { envelope, payload });
                    }
                }
                Effect::Close { connection, reason } => {
                    if let Some(name) = self.node_of(connection) {
                        self.down(&name, agent::Event::Disconnected { reason });
                        if let Some(node) = self.nodes.get_mut(&name) {
                            node.connected = false;
                        }
                    }
                }
                Effect::Update(update) => self.updated(*update),
            }
        }
    }

    pub(crate) fn updated(&mut self, update: Update) {
        if let Update::Ended { outcome } = &update {
            assert!(self.ended.is_none(), "seed {}: ended twice", self.scenario.seed);
            self.ending_ns.get_or_insert(self.now);
            self.ended = Some((self.now, outcome.clone()));
        }
        for command in self.driver.react(&update) {
            self.last_command = self.last_command.max(self.now + self.random.range(0, 3 * MS));
            let event = Event::Command { command: Box::new(command) };
            self.at(self.last_command, Happening::Coordinator(event));
        }
        self.updates.push((self.now, update));
    }

    pub(crate) fn node_of(&self, connection: ConnectionId) -> Option<NodeId> {
        let mut nodes = self.nodes.iter();
        nodes.find(|(_, node)| node.connection == connection && node.connected).map(|(name, _)| name.clone())
    }

    /// An event for the coordinator over a node's connection: late, but in order.
    pub(crate) fn up(&mut self, name: &NodeId, event: Event) {
        let delay = self.random.range(MS / 10, self.scenario.delay_ns);
        let Some(node) = self.nodes.get_mut(name) else { return };
        let at = (self.now.max(node.held_until) + delay).max(node.last_up);
        node.last_up = at;
        if at < FOR_EVER {
            self.at(at, Happening::Coordinator(event));
        }
    }

    pub(crate) fn down(&mut self, name: &NodeId, event: agent::Event) {
        let delay = self.random.range(MS / 10, self.scenario.delay_ns);
        let Some(node) = self.nodes.get_mut(name) else { return };
        let at = (self.now.max(node.held_until) + delay).max(node.last_down);
        node.last_down = at;
        if at < FOR_EVER {
            self.at(at, Happening::Agent(name.clone(), event));
        }
    }

    // Agents.

    pub(crate) fn agent_event(&mut self, name: &NodeId, event: agent::Event) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if node.hung {
            node.backlog.push(event);
            return;
        }
        let Some(machine) = &mut node.agent else { return };
        machine.handle(self.now, event);
        self.agent_effects(name);
    }

    pub(crate) fn agent_effects(&mut self, name: &NodeId) {
        while let Some(effect) =
            self.nodes.get_mut(name).and_then(|node| node.agent.as_mut()).and_then(Agent::poll_effect)
        {
            self.agent_effect(name, effect);
        }
    }

    pub(crate) fn agent_effect(&mut self, name: &NodeId, effect: agent::Effect) {
        let answer = |event| Happening::Agent(name.clone(), event);
        match effect {
            agent::Effect::Send { envelope, payload } => {
                let Some(node) = self.nodes.get(name).filter(|node| node.connected) else { return };
                let connection = node.connection;
                self.up(name, Event::AgentMessage { connection, envelope, payload });
            }
            agent::Effect::Discover => {
                let isolation = Isolation::Unisolated;
                let node = NodeSpec {
                    name: name.clone(),
                    cores: 2,
                    memory_bytes: 1,
                    isolation,
                    devices: Vec::new(),
                };
                self.after(MS, 20 * MS, answer(agent::Event::Inventory { node, unusable: Vec::new() }));
            }
            agent::Effect::CheckBlob { hash, .. } => {
                let event = agent::Event::BlobState { hash, complete: false, size_bytes: 0 };
                self.after(MS, 5 * MS, answer(event));
            }
            agent::Effect::StoreChunk { hash, offset, bytes } => {
                let size_bytes = offset + bytes.len() as u64;
                if size_bytes >= crate::driver::BLOB_BYTES {
                    let event = agent::Event::BlobState { hash, complete: true, size_bytes };
                    self.after(MS, 5 * MS, answer(event));
                }
            }
            agent::Effect::Spawn { start } => {
                let clock_ns = self.random.range(0, 1000 * SECOND);
                let process = Process::new(&self.run, name.clone(), clock_ns);
                let worker = start.device;
                self.processes.insert(worker.clone(), process);
                self.pipes.insert(worker.clone(), self.now);
                let (engine, modules) = ("none".into(), Vec::new());
                self.after(
                    MS,
                    30 * MS,
                    answer(agent::Event::WorkerStarted { worker, pid: 7, engine, modules }),
                );
            }
            agent::Effect::WriteWorker { worker, envelope, .. } => {
                // The pipe keeps order: all orders take equally long.
                self.at(self.now + MS, Happening::Order(worker, envelope));
            }
            agent::Effect::Kill { worker, signal } => {
                let exit = Exit::Signal { signal };
                self.after(MS, 20 * MS, Happening::Worker(worker, Do::Exit(exit)));
            }
            agent::Effect::HoldGrants => {
                let message = "not held".into();
                self.after(MS, 5 * MS, answer(agent::Event::GrantsHeld { isolated: false, message }));
            }
            agent::Effect::Exit { .. } => self.agent_gone(name, LostCause::Closed),
        }
    }

    /// The agent's process ends: its workers' pipes close, its connection too.
    pub(crate) fn agent_gone(&mut self, name: &NodeId, cause: LostCause) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.agent = None;
        self.last_alive_ns = self.last_alive_ns.max(self.now);
        if node.connected {
            let connection = node.connection;
            self.up(name, Event::AgentLost { connection, cause });
        }
        let orphans: Vec<DeviceId> = self.processes_where(|process| process.node == *name && process.alive);
        for device in orphans {
            self.after(0, 5 * MS, Happening::Worker(device, Do::Exit(Exit::Code { code: 0 })));
        }
    }
}
