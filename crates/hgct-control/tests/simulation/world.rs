//! The world: virtual time, a network that delays, holds and breaks, nodes, processes, a driver.

use std::collections::BTreeMap;

use hgct_control::agent::{self, Agent};
use hgct_control::auth::{Key, Token};
use hgct_control::coordinator::{
    Command, Config, ConnectionId, Coordinator, Effect, Event, LostCause, Outcome, Phase, Update,
};
use hgct_control::detector::Limits;
use hgct_control::message::{Envelope, Exit, FromWorker, ToWorker};
use hgct_core::cluster::{Isolation, NodeSpec};
use hgct_core::ids::{DeviceId, Generation, NodeId, Rank, RunId};
use hgct_core::schedule::Operation;

use crate::driver::Driver;
use crate::random::Random;
use crate::scenario::{Fault, FaultKind, Scenario};
use crate::worker::{self, Group, Process};

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1000 * MS;
/// A step waits this long for its peers inside of a worker.
const STEP_DEADLINE: u64 = 10 * SECOND;
const FOR_EVER: u64 = u64::MAX / 4;

enum Happening {
    Coordinator(Event),
    Agent(NodeId, agent::Event),
    Order(DeviceId, Box<Envelope<ToWorker>>),
    Worker(DeviceId, Do),
    Fault(usize),
    ResumeAgent(NodeId),
    ResumeCoordinator,
    Regroup,
}

enum Do {
    Beat,
    Say(Generation, Box<FromWorker>),
    Connected,
    StepDone(u64),
    Blame,
    BlameHung(Rank),
    Exit(Exit),
}

pub(crate) struct Node {
    pub(crate) agent: Option<Agent>,
    /// The agent's process is stopped; what comes waits.
    hung: bool,
    backlog: Vec<agent::Event>,
    connection: ConnectionId,
    connected: bool,
    last_up: u64,
    last_down: u64,
    /// The network holds everything of this node until then.
    pub(crate) held_until: u64,
}

pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) scenario: Scenario,
    pub(crate) random: Random,
    queue: BTreeMap<(u64, u64), Happening>,
    sequence: u64,
    run: RunId,
    pub(crate) coordinator: Option<Coordinator>,
    coordinator_paused: bool,
    coordinator_backlog: Vec<Event>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) processes: BTreeMap<DeviceId, Process>,
    pipes: BTreeMap<DeviceId, u64>,
    groups: BTreeMap<Generation, Group>,
    running: BTreeMap<Generation, u64>,
    stop_after: BTreeMap<Generation, u64>,
    driver: Driver,
    last_command: u64,
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
            let coordinator = self.coordinator.as_ref().filter(|_| !self.coordinator_paused);
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
                self.coordinator_event(Event::Tick);
            } else if let Some((_, name)) = agent {
                self.agent_event(&name, agent::Event::Tick { memory_bytes: 1 });
            }
        }
        panic!("seed {}: no end after 200,000 events, at {} ms", self.scenario.seed, self.now / MS);
    }

    fn at(&mut self, at_ns: u64, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((at_ns.max(self.now), self.sequence), happening);
    }

    fn after(&mut self, low_ns: u64, high_ns: u64, happening: Happening) {
        let at = self.now + self.random.range(low_ns, high_ns);
        self.at(at, happening);
    }

    fn happen(&mut self, happening: Happening) {
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

    fn coordinator_event(&mut self, event: Event) {
        if self.coordinator_paused {
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

    fn updated(&mut self, update: Update) {
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

    fn node_of(&self, connection: ConnectionId) -> Option<NodeId> {
        let mut nodes = self.nodes.iter();
        nodes.find(|(_, node)| node.connection == connection && node.connected).map(|(name, _)| name.clone())
    }

    /// An event for the coordinator over a node's connection: late, but in order.
    fn up(&mut self, name: &NodeId, event: Event) {
        let delay = self.random.range(MS / 10, self.scenario.delay_ns);
        let Some(node) = self.nodes.get_mut(name) else { return };
        let at = (self.now.max(node.held_until) + delay).max(node.last_up);
        node.last_up = at;
        if at < FOR_EVER {
            self.at(at, Happening::Coordinator(event));
        }
    }

    fn down(&mut self, name: &NodeId, event: agent::Event) {
        let delay = self.random.range(MS / 10, self.scenario.delay_ns);
        let Some(node) = self.nodes.get_mut(name) else { return };
        let at = (self.now.max(node.held_until) + delay).max(node.last_down);
        node.last_down = at;
        if at < FOR_EVER {
            self.at(at, Happening::Agent(name.clone(), event));
        }
    }

    // Agents.

    fn agent_event(&mut self, name: &NodeId, event: agent::Event) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if node.hung {
            node.backlog.push(event);
            return;
        }
        let Some(machine) = &mut node.agent else { return };
        machine.handle(self.now, event);
        self.agent_effects(name);
    }

    fn agent_effects(&mut self, name: &NodeId) {
        while let Some(effect) =
            self.nodes.get_mut(name).and_then(|node| node.agent.as_mut()).and_then(Agent::poll_effect)
        {
            self.agent_effect(name, effect);
        }
    }

    fn agent_effect(&mut self, name: &NodeId, effect: agent::Effect) {
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
    fn agent_gone(&mut self, name: &NodeId, cause: LostCause) {
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

    // Workers.

    fn processes_where(&self, is_chosen: impl Fn(&Process) -> bool) -> Vec<DeviceId> {
        self.processes.iter().filter(|(_, process)| is_chosen(process)).map(|(d, _)| d.clone()).collect()
    }

    /// An event of a worker's for its agent, in order.
    fn pipe(&mut self, device: &DeviceId, event: agent::Event) {
        let Some(name) = self.processes.get(device).map(|process| process.node.clone()) else { return };
        let delay = self.random.range(MS / 10, 2 * MS);
        let last = self.pipes.entry(device.clone()).or_default();
        let at = (self.now + delay).max(*last);
        *last = at;
        self.at(at, Happening::Agent(name, event));
    }

    fn say(&mut self, device: &DeviceId, generation: Generation, message: FromWorker, payload: Vec<u8>) {
        let Some(process) = self.processes.get_mut(device) else { return };
        let envelope = Box::new(process.seal(generation, message));
        self.pipe(device, agent::Event::WorkerMessage { worker: device.clone(), envelope, payload });
    }

    fn later(&mut self, device: &DeviceId, low: u64, high: u64, message: FromWorker) {
        let Some(process) = self.processes.get(device) else { return };
        let say = Do::Say(process.generation, Box::new(message));
        self.after(low, high, Happening::Worker(device.clone(), say));
    }

    fn order(&mut self, device: &DeviceId, envelope: Envelope<ToWorker>) {
        let Some(process) = self.processes.get_mut(device).filter(|process| process.alive) else { return };
        if process.hung {
            return;
        }
        process.inbox.admit(&envelope).unwrap();
        match envelope.message {
            ToWorker::Attach { .. } => {
                self.after(0, MS, Happening::Worker(device.clone(), Do::Beat));
                let hello = FromWorker::Hello { description: worker::description(), endpoints: Vec::new() };
                self.later(device, 50 * MS, 500 * MS, hello);
            }
            ToWorker::Check { kind, .. } => {
                let report = crate::driver::check_report(device, kind);
                self.later(device, 20 * MS, 300 * MS, FromWorker::Checked { report });
            }
            ToWorker::Load { generation, rank, .. } => {
                process.generation = generation;
                process.rank = Some(rank);
                process.enter(self.now, None);
                self.later(device, 10 * MS, 200 * MS, FromWorker::Loaded);
            }
            ToWorker::Connect { peers, .. } => {
                process.generation = envelope.generation;
                let group = self.groups.entry(envelope.generation).or_default();
                group.devices = peers.into_iter().map(|peer| peer.device).collect();
                group.connected += 1;
                if group.connected as usize == group.devices.len() {
                    for device in group.devices.clone() {
                        self.after(MS, 30 * MS, Happening::Worker(device, Do::Connected));
                    }
                }
            }
            ToWorker::MeasureLinks => {
                self.later(device, MS, 50 * MS, FromWorker::LinksMeasured { links: Vec::new() });
            }
            ToWorker::Start { step, end_step, .. } => {
                let generation = process.generation;
                (process.step, process.end_step, process.training) = (step, end_step, true);
                self.say(device, generation, FromWorker::Ready, Vec::new());
                if step == end_step {
                    let finished = FromWorker::Finished { step, stopped: false };
                    self.say(device, generation, finished, Vec::new());
                } else {
                    self.arrive(device);
                }
            }
            ToWorker::Stop => process.stop = true,
            ToWorker::Exit => {
                // Now and then an exit is too slow for the grace.
                let high = if self.random.chance(10) { 3000 * MS } else { 300 * MS };
                self.after(MS, high, Happening::Worker(device.clone(), Do::Exit(Exit::Code { code: 0 })));
            }
            ToWorker::State { .. }
            | ToWorker::Profile { .. }
            | ToWorker::Generate { .. }
            | ToWorker::TrainAlone { .. } => {}
        }
    }

    fn work(&mut self, device: &DeviceId, what: Do) {
        let Some(process) = self.processes.get_mut(device).filter(|process| process.alive) else { return };
        let acts = process.acts();
        let generation = process.generation;
        match what {
            Do::Exit(exit) if !process.hung || matches!(exit, Exit::Signal { .. }) => self.died(device, exit),
            // Else a stopped process does not see that its pipe closed; its death signal ends it.
            Do::Exit(_) if self.nodes.get(&process.node).is_none_or(|node| node.agent.is_none()) => {
                self.died(device, Exit::Signal { signal: 9 });
            }
            Do::Beat if acts => {
                let beat = process.beat(self.now);
                self.say(device, generation, FromWorker::Beat(beat), Vec::new());
                self.after(500 * MS, 501 * MS, Happening::Worker(device.clone(), Do::Beat));
            }
            Do::Say(generation, message) if acts && !process.stalled => {
                self.say(device, generation, *message, Vec::new());
            }
            Do::Connected if acts && !process.stalled => {
                self.say(device, generation, FromWorker::Connected, Vec::new());
            }
            Do::StepDone(step) if acts && !process.stalled => self.step_done(device, generation, step),
            Do::Blame if acts && !process.stalled => {
                let group =
                    self.groups.get(&generation).map(|group| group.devices.clone()).unwrap_or_default();
                let is_down =
                    |device: &DeviceId| self.processes.get(device).is_some_and(|p| !p.alive || p.failed);
                let down: Vec<Rank> =
                    (0..).map(Rank).zip(&group).filter(|(_, d)| is_down(d)).map(|(rank, _)| rank).collect();
                if !down.is_empty() {
                    let peer = *self.random.pick(&down);
                    self.give_up(device, format!("connection to {peer} was reset"), Some(peer));
                }
            }
            Do::BlameHung(peer) if acts && !process.stalled && process.training => {
                self.give_up(device, format!("{peer} did not answer within 10 s"), Some(peer));
            }
            _ => {}
        }
    }

    /// The worker says that it cannot go on, and exits.
    fn give_up(&mut self, device: &DeviceId, error: String, peer: Option<Rank>) {
        let Some(process) = self.processes.get_mut(device) else { return };
        process.failed = true;
        let generation = process.generation;
        self.say(device, generation, FromWorker::Failed { error, peer }, Vec::new());
        self.after(MS, 50 * MS, Happening::Worker(device.clone(), Do::Exit(Exit::Code { code: 1 })));
    }

    fn died(&mut self, device: &DeviceId, exit: Exit) {
        let Some(process) = self.processes.get_mut(device) else { return };
        process.alive = false;
        let (generation, was_training) = (process.generation, process.rank.is_some());
        self.last_alive_ns = self.last_alive_ns.max(self.now);
        let log_tail = "the end".into();
        self.pipe(device, agent::Event::WorkerExited { worker: device.clone(), exit, log_tail });
        if was_training {
            let peers = self.groups.get(&generation).map(|group| group.devices.clone()).unwrap_or_default();
            for peer in peers {
                if self.processes.get(&peer).is_some_and(|p| p.training && p.generation == generation) {
                    self.after(MS, 150 * MS, Happening::Worker(peer, Do::Blame));
                }
            }
        }
    }

    /// The worker has come to its next step and waits for the others.
    fn arrive(&mut self, device: &DeviceId) {
        let Some(process) = self.processes.get_mut(device) else { return };
        let (generation, step) = (process.generation, process.step);
        let Some(rank) = process.rank else { return };
        process.enter(self.now, Some(Operation::RecvActivation));
        self.groups.entry(generation).or_default().arrived.insert(rank, step);
        self.try_step(generation);
    }

    /// Starts the step that all ranks have come to.
    fn try_step(&mut self, generation: Generation) {
        let Some(group) = self.groups.get(&generation) else { return };
        let devices = group.devices.clone();
        let steps: Vec<u64> = group.arrived.values().copied().collect();
        let Some(step) = steps.iter().min().copied() else { return };
        let together = steps.len() == devices.len() && steps.iter().all(|s| *s == step);
        let ready = devices.iter().all(|device| {
            let process = self.processes.get(device);
            process.is_some_and(|p| {
                let held = self.nodes.get(&p.node).is_some_and(|node| node.held_until > self.now);
                p.acts() && !p.stalled && !held
            })
        });
        if !together || !ready || self.running.get(&generation).is_some_and(|running| *running >= step) {
            return;
        }
        self.running.insert(generation, step);
        if devices.iter().any(|device| self.processes.get(device).is_some_and(|p| p.stop)) {
            self.stop_after.entry(generation).or_insert(step);
        }
        let duration = self.random.range(50 * MS, 400 * MS);
        for device in devices {
            if let Some(process) = self.processes.get_mut(&device) {
                process.enter(self.now, Some(Operation::Forward));
            }
            self.after(duration, duration + 20 * MS, Happening::Worker(device, Do::StepDone(step)));
        }
    }

    fn step_done(&mut self, device: &DeviceId, generation: Generation, step: u64) {
        let broken = self.groups.get(&generation).is_some_and(|group| {
            group
                .devices
                .iter()
                .any(|d| self.processes.get(d).is_some_and(|p| !p.alive || p.hung || p.stalled))
        });
        let Some(process) = self.processes.get_mut(device) else { return };
        if process.step != step {
            return;
        }
        if broken {
            // Its own part is done; it waits for the others'.
            process.enter(self.now, Some(Operation::RecvActivation));
            return;
        }
        process.step += 1;
        let rank = process.rank.unwrap_or(Rank(0));
        let stopped = self.stop_after.get(&generation) == Some(&step);
        let last = process.step == process.end_step || stopped;
        process.enter(self.now, None);
        let mut loss = worker::loss(generation, step);
        if self.scenario.nan_from.is_some_and(|from| step >= from) {
            loss = f64::NAN;
        }
        if self.scenario.wrong_at == Some(step) && rank == Rank(0) {
            loss += 1.0;
        }
        let report = worker::report(generation, step, loss);
        self.say(device, generation, FromWorker::StepDone(report), Vec::new());
        if last || step % 3 == 2 {
            let chunk = FromWorker::ShardChunk {
                step: step + 1,
                num_updates: step + 1,
                offset: 0,
                entries: Some(Vec::new()),
            };
            self.say(device, generation, chunk, vec![rank.0 as u8; 5]);
        }
        if last {
            let finished = FromWorker::Finished { step: step + 1, stopped };
            self.say(device, generation, finished, Vec::new());
            if let Some(process) = self.processes.get_mut(device) {
                process.training = false;
            }
        } else {
            self.arrive(device);
        }
    }

    // Faults.

    fn fault(&mut self, index: usize) {
        let Some(fault) = self.scenario.faults.get(index).cloned() else { return };
        if self.apply(&fault.kind) {
            self.hits.push((self.now, fault));
        }
    }

    /// Whether it hit something.
    fn apply(&mut self, kind: &FaultKind) -> bool {
        let over = self.ending_ns.is_some();
        match kind {
            FaultKind::KillWorker(device) => {
                let alive = self.processes.get(device).is_some_and(|process| process.alive);
                if alive {
                    self.died(device, Exit::Signal { signal: 9 });
                }
                alive && !over
            }
            FaultKind::FailWorker(device) => {
                let acts = self.processes.get(device).is_some_and(|p| p.acts() && p.rank.is_some());
                if acts {
                    self.give_up(device, "the engine is out of memory".into(), None);
                }
                acts && !over
            }
            FaultKind::HangWorker(device) | FaultKind::StallWorker(device) => {
                let hang = matches!(kind, FaultKind::HangWorker(_));
                let now = self.now;
                let Some(process) = self.processes.get_mut(device) else { return false };
                // A stall is about an action: outside of training it would be a deadline's matter.
                if !process.acts() || process.stalled || (!hang && !process.training) {
                    return false;
                }
                process.hung |= hang;
                process.stalled |= !hang;
                if !hang {
                    process.enter(now, Some(Operation::Forward));
                }
                let (generation, rank) = (process.generation, process.rank);
                let group =
                    self.groups.get(&generation).map(|group| group.devices.clone()).unwrap_or_default();
                if let Some(rank) = rank {
                    for peer in group.into_iter().filter(|peer| peer != device) {
                        let at = self.now + STEP_DEADLINE;
                        self.at(at, Happening::Worker(peer, Do::BlameHung(rank)));
                    }
                }
                !over
            }
            FaultKind::KillAgent(name) => {
                let there = self.nodes.get(name).is_some_and(|node| node.agent.is_some());
                if there {
                    self.agent_gone(name, LostCause::Closed);
                }
                there && !over
            }
            FaultKind::HangAgent(name, for_ns) => {
                let Some(node) = self.nodes.get_mut(name).filter(|node| node.agent.is_some()) else {
                    return false;
                };
                node.hung = true;
                self.at(self.now + for_ns, Happening::ResumeAgent(name.clone()));
                true
            }
            FaultKind::Hold(name, for_ns) => {
                let until = self.now.saturating_add(*for_ns).min(FOR_EVER);
                let Some(node) = self.nodes.get_mut(name) else { return false };
                node.held_until = node.held_until.max(until);
                if until < FOR_EVER {
                    self.at(until, Happening::Regroup);
                }
                !over
            }
            FaultKind::Reset(name) => {
                let Some(node) = self.nodes.get_mut(name).filter(|node| node.connected) else { return false };
                let connection = node.connection;
                let message: String = "connection reset by peer".into();
                let cause = LostCause::Connection { message: message.clone() };
                self.up(name, Event::AgentLost { connection, cause });
                self.down(name, agent::Event::Disconnected { reason: message });
                !over
            }
            FaultKind::CrashCoordinator => {
                let names: Vec<NodeId> = self.nodes.keys().cloned().collect();
                for name in names {
                    self.down(&name, agent::Event::Disconnected { reason: "end of file".into() });
                    if let Some(node) = self.nodes.get_mut(&name) {
                        node.connected = false;
                    }
                }
                self.coordinator.take().is_some_and(|machine| machine.phase() != Phase::Ended)
            }
            FaultKind::PauseCoordinator(for_ns) => {
                self.coordinator_paused = true;
                self.at(self.now + for_ns, Happening::ResumeCoordinator);
                true
            }
            FaultKind::Stop { twice } => {
                for at in [0, 50 * MS].into_iter().take(1 + usize::from(*twice)) {
                    let command = Box::new(Command::Stop);
                    self.at(self.now + at, Happening::Coordinator(Event::Command { command }));
                }
                !over
            }
            FaultKind::Ghost(device) => self.ghost(device),
        }
    }

    /// Words of an older generation that come late.
    fn ghost(&mut self, device: &DeviceId) -> bool {
        let Some(process) = self.processes.get(device).filter(|process| process.acts()) else { return false };
        let (generation, step) = (process.generation, process.step);
        if generation.sequence < 2 {
            return false;
        }
        let old = Generation { sequence: generation.sequence - 1, ..generation };
        let words = [
            FromWorker::StepDone(worker::report(old, step, 1.0)),
            FromWorker::Finished { step, stopped: false },
            FromWorker::Failed { error: "a ghost".into(), peer: Some(Rank(0)) },
            FromWorker::Loaded,
            FromWorker::Ready,
            FromWorker::Connected,
        ];
        for word in words {
            self.say(device, old, word, Vec::new());
        }
        true
    }
}
