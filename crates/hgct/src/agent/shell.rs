//! The agent's loop: what wakes it goes into the machine, what comes out is done.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use hgct_comm::monotonic_ns;
use hgct_control::agent::{Agent, Effect, Event};
use hgct_control::message::{Exit, ToWorker, UnusableDevice, WorkerStart};
use hgct_core::cluster::{Grant, Isolation, NodeSpec};
use hgct_core::ids::{DeviceId, Kind};
use rustix::process::Signal;

use super::Wake;
use super::blobs::{self, Request};
use super::budget::Budget;
use super::link::{Link, Windows};
use super::worker::{Start, Worker};
use crate::devices::{self, Discovery, Options};
use crate::environments::{Environment, Environments};
use crate::grants::{self, Held, Holder};

/// Pieces of contents that may wait for the disk.
const BLOBS_WINDOW: usize = 4 << 20;
/// What workers have said and the connection has not taken.
const SAID_WINDOW: usize = 8 << 20;
/// How long the last messages may take to leave.
const FAREWELL: Duration = Duration::from_secs(1);
/// Tells a worker which version of the core starts it: another one refuses before the first order.
const CORE_VARIABLE: &str = "HGCT_CORE";
/// Pieces of a log that are passed on when its worker ends.
const LAST_PIECES: usize = 16;

/// Everything around the machine.
pub(super) struct Shell {
    wakes: Sender<Wake>,
    link: Link,
    windows: Arc<Windows>,
    said: Arc<Budget>,
    blobs: Sender<Request>,
    options: Options,
    logs: PathBuf,
    /// Cores of this node by their place in a grant.
    cores: Vec<u32>,
    /// `Err`: why grants are not held.
    holder: Result<Holder, String>,
    crew: BTreeMap<DeviceId, Member>,
    incarnations: u64,
    discovery: Option<Discovery>,
    discovering: bool,
    /// To start once the devices are known.
    postponed: Vec<WorkerStart>,
    /// Whether the inventory was asked for.
    inventory_wanted: bool,
    /// Payload bytes that the last event made go on.
    passed: usize,
    leaving: Option<(String, bool)>,
}

/// A worker with what it is held by.
struct Member {
    worker: Worker,
    held: Option<Held>,
    cpu_millicores: u32,
    memory_bytes: u64,
}

impl Shell {
    pub(super) fn new(
        wakes: Sender<Wake>,
        stream: TcpStream,
        options: Options,
        blobs: &Path,
        logs: PathBuf,
    ) -> io::Result<Self> {
        let windows = Arc::new(Windows::new(BLOBS_WINDOW));
        let said = Arc::new(Budget::new(SAID_WINDOW));
        let answers = wakes.clone();
        let answer = move |state| drop(answers.send(Wake::Blob(state)));
        let blobs = blobs::start(blobs.to_owned(), Arc::clone(&windows.blobs), answer)?;
        let link = Link::start(stream, &wakes, Arc::clone(&windows), Arc::clone(&said))?;
        // Tried, not only looked for: a hierarchy that is there may be read-only.
        let holder = match grants::isolation() {
            (Isolation::Cgroup, _) => Holder::open().map_err(|error| chain(&error)),
            (_, why_not) => Err(why_not),
        };
        Ok(Self {
            wakes,
            link,
            windows,
            said,
            blobs,
            options,
            logs,
            cores: devices::allowed_cores(),
            holder,
            crew: BTreeMap::new(),
            incarnations: 0,
            discovery: None,
            discovering: false,
            postponed: Vec::new(),
            inventory_wanted: false,
            passed: 0,
            leaving: None,
        })
    }

    /// Runs the machine to its end; why it ended, and whether the coordinator wanted it.
    pub(super) fn drive(&mut self, mut machine: Agent, inbox: &Receiver<Wake>) -> (String, bool) {
        let mut signals = 0;
        loop {
            self.perform(&mut machine);
            if let Some(leaving) = self.leaving.take() {
                return leaving;
            }
            let Some(at_ns) = machine.poll_timeout() else {
                return ("the machine ended without a reason".into(), false);
            };
            let wait = Duration::from_nanos(at_ns.saturating_sub(monotonic_ns()));
            match inbox.recv_timeout(wait) {
                Ok(Wake::Signal(signal)) => {
                    signals += 1;
                    let name = Exit::Signal { signal };
                    if signals > 1 {
                        return (format!("ended at once by {name}"), false);
                    }
                    machine.handle(monotonic_ns(), Event::Terminate { reason: format!("ended by {name}") });
                }
                Ok(wake) => self.wake(&mut machine, wake),
                Err(RecvTimeoutError::Timeout) => {
                    self.tell_news(&mut machine);
                    machine.handle(monotonic_ns(), Event::Tick { memory_bytes: resident_bytes() });
                }
                Err(RecvTimeoutError::Disconnected) => return ("the inbox is gone".into(), false),
            }
        }
    }

    /// Ends what is left of the workers and sends the last messages.
    pub(super) fn close(mut self) {
        self.crew.clear();
        self.link.close(FAREWELL);
    }

    fn wake(&mut self, machine: &mut Agent, wake: Wake) {
        match wake {
            Wake::Order { envelope, payload } => {
                let bytes = payload.len();
                let window = self.windows.of(&envelope.message);
                self.pass(machine, Event::Message { envelope, payload }, bytes, window.as_deref());
            }
            Wake::Said { worker, incarnation, envelope, payload } => {
                let (bytes, said) = (payload.len(), Arc::clone(&self.said));
                if self.is_current(&worker, incarnation) {
                    let event = Event::WorkerMessage { worker, envelope, payload };
                    self.pass(machine, event, bytes, Some(&said));
                } else {
                    said.give(bytes);
                }
            }
            Wake::Lost { cause } => machine.handle(monotonic_ns(), Event::Disconnected { reason: cause }),
            Wake::Stuck { worker } => {
                let error = "it does not take its orders from the pipe".into();
                machine.handle(monotonic_ns(), Event::WorkerBroken { worker, error });
            }
            Wake::Broken { worker, incarnation, error } => {
                if self.is_current(&worker, incarnation) {
                    machine.handle(monotonic_ns(), Event::WorkerBroken { worker, error });
                }
            }
            Wake::Exited { worker, incarnation, exit } => {
                if self.is_current(&worker, incarnation) {
                    self.bury(machine, worker, exit);
                }
            }
            Wake::Discovered(found) => self.discovered(machine, *found),
            Wake::Blob(Ok(blobs::State { hash, complete, size_bytes })) => {
                machine.handle(monotonic_ns(), Event::BlobState { hash, complete, size_bytes });
            }
            // Without its contents no worker of this node can train.
            Wake::Blob(Err(reason)) => machine.handle(monotonic_ns(), Event::Terminate { reason }),
            Wake::Signal(_) => {}
        }
    }

    /// Gives an event with a payload to the machine; what the machine drops makes room again.
    fn pass(&mut self, machine: &mut Agent, event: Event, bytes: usize, window: Option<&Budget>) {
        machine.handle(monotonic_ns(), event);
        self.passed = 0;
        self.perform(machine);
        if let Some(window) = window.filter(|_| bytes > self.passed) {
            window.give(bytes - self.passed);
        }
    }

    fn is_current(&self, worker: &DeviceId, incarnation: u64) -> bool {
        self.crew.get(worker).is_some_and(|member| member.worker.incarnation == incarnation)
    }

    /// Does all that the machine wants.
    fn perform(&mut self, machine: &mut Agent) {
        while let Some(effect) = machine.poll_effect() {
            match effect {
                Effect::Send { envelope, payload } => {
                    self.passed += payload.len();
                    self.link.send(&envelope, payload);
                }
                Effect::WriteWorker { worker, envelope, payload } => {
                    if let Some(member) = self.crew.get(&worker) {
                        self.passed += payload.len();
                        if envelope.message == ToWorker::Exit
                            && let Some(held) = &member.held
                        {
                            // Its end need not wait for its quota; if that fails, it is slower.
                            let _ = held.release();
                        }
                        member.worker.send(&envelope, payload);
                    }
                }
                Effect::StoreChunk { hash, offset, bytes } => {
                    self.passed += bytes.len();
                    let _ = self.blobs.send(Request::Piece { hash, offset, bytes });
                }
                Effect::CheckBlob { hash, size_bytes } => {
                    let _ = self.blobs.send(Request::Look { hash, size_bytes });
                }
                Effect::Discover => {
                    self.inventory_wanted = true;
                    self.discover();
                }
                Effect::Spawn { start } if self.discovery.is_none() => {
                    self.postponed.push(start);
                    self.discover();
                }
                Effect::Spawn { start } => self.spawn(machine, &start),
                Effect::Kill { worker, signal } => {
                    let signal = Signal::from_named_raw(signal).unwrap_or(Signal::KILL);
                    match self.crew.get(&worker) {
                        Some(member) => member.worker.signal(signal),
                        None => self.postponed.retain(|start| start.device != worker),
                    }
                }
                Effect::HoldGrants => {
                    let (isolated, message) = self.hold();
                    machine.handle(monotonic_ns(), Event::GrantsHeld { isolated, message });
                }
                Effect::Exit { reason, orderly } => self.leaving = Some((reason, orderly)),
            }
        }
    }

    /// Asks for the devices on a thread of its own: frameworks take seconds to answer.
    fn discover(&mut self) {
        if std::mem::replace(&mut self.discovering, true) {
            return;
        }
        let (options, wakes) = (self.options.clone(), self.wakes.clone());
        let look = move || {
            let found = devices::discover(&options).map_err(|error| chain(&error));
            let _ = wakes.send(Wake::Discovered(Box::new(found)));
        };
        if let Err(error) = std::thread::Builder::new().name("hgct-discover".into()).spawn(look) {
            let failed = Err(format!("no thread to look for devices: {error}"));
            let _ = self.wakes.send(Wake::Discovered(Box::new(failed)));
        }
    }

    fn discovered(&mut self, machine: &mut Agent, found: Result<Discovery, String>) {
        self.discovering = false;
        let discovery = found.unwrap_or_else(|reason| self.nothing(reason));
        if std::mem::take(&mut self.inventory_wanted) {
            let (node, unusable) = (discovery.node.clone(), discovery.unusable.clone());
            machine.handle(monotonic_ns(), Event::Inventory { node, unusable });
        }
        self.discovery = Some(discovery);
        for start in std::mem::take(&mut self.postponed) {
            self.spawn(machine, &start);
        }
    }

    /// A node without devices, and why.
    fn nothing(&self, reason: String) -> Discovery {
        let node = NodeSpec {
            name: self.options.node.clone(),
            cores: self.cores.len() as u32,
            memory_bytes: 0,
            isolation: Isolation::Unisolated,
            devices: Vec::new(),
        };
        let name = format!("node {}", node.name);
        let kind = Kind::new("any").ok();
        let unusable =
            kind.map(|kind| UnusableDevice { name, kind, environment: None, reason }).into_iter().collect();
        Discovery { node, details: BTreeMap::new(), unusable }
    }

    fn spawn(&mut self, machine: &mut Agent, start: &WorkerStart) {
        let worker = start.device.clone();
        let event = match self.start(start) {
            Ok((pid, engine, modules)) => Event::WorkerStarted { worker, pid, engine, modules },
            Err(reason) => {
                let exit = Exit::NotStarted { reason };
                Event::WorkerExited { worker, exit, log_tail: String::new() }
            }
        };
        machine.handle(monotonic_ns(), event);
    }

    /// Starts a worker's process: its id, engine and modules, or why it does not start.
    fn start(&mut self, start: &WorkerStart) -> Result<(u32, String, Vec<String>), String> {
        let (environment, detail) = self.place(start)?;
        let mut command = environment.worker(&detail.variables, start.grant.threads);
        if !environment.variables.contains_key(CORE_VARIABLE) {
            command.env(CORE_VARIABLE, env!("HGCT_CORE"));
        }
        let mut cores = Vec::new();
        for index in &start.grant.cores {
            let core = self.cores.get(*index as usize);
            cores.push(*core.ok_or_else(|| {
                format!("its grant has core {index}, but the node has {}", self.cores.len())
            })?);
        }
        let name = start.device.as_str().replace(['/', ':'], "-");
        let mut held = match &self.holder {
            Ok(holder) => holder.group(&name).inspect_err(|error| self.warn(start, &chain(error))).ok(),
            Err(_) => None,
        };
        self.incarnations += 1;
        let begin = Start {
            device: start.device.clone(),
            command,
            cores: (!cores.is_empty()).then(|| grants::core_set(&cores)),
            log: self.logs.join(format!("{name}.log")),
            incarnation: self.incarnations,
        };
        let interpreter = environment.interpreter.display();
        let worker = Worker::start(begin, &self.wakes, &self.said)
            .map_err(|error| format!("{interpreter} does not start: {error}"))?;
        // Before it has threads: it waits for its first order.
        if let Some(Err(error)) = held.as_mut().map(|held| held.join(worker.id())) {
            self.warn(start, &chain(&error));
            held = None;
        }
        let pid = worker.id();
        self.windows.open(start.device.clone(), worker.window());
        let Grant { cpu_millicores, memory_bytes, .. } = start.grant;
        self.crew.insert(start.device.clone(), Member { worker, held, cpu_millicores, memory_bytes });
        Ok((pid, environment.engine, detail.modules))
    }

    /// Where a worker runs, from what this node itself knows of its device.
    fn place(&self, start: &WorkerStart) -> Result<(Environment, devices::Detail), String> {
        let found = self.discovery.as_ref().ok_or("the devices of this node are not known")?;
        let device = found.node.devices.iter().find(|device| device.id == start.device);
        let Some((device, detail)) = device.zip(found.details.get(&start.device)) else {
            let lost =
                found.unusable.iter().find(|lost| lost.name.ends_with(&format!(" in {}", start.environment)));
            let why = lost.map_or_else(String::new, |lost| format!(" ({}: {})", lost.name, lost.reason));
            return Err(format!(
                "{} is no device of this node any more{why}: run `hgct devices`",
                start.device
            ));
        };
        if device.environment != start.environment || device.device_string != start.device_string {
            return Err(format!(
                "{} is {} in environment {} now, not {} in {}: plan again",
                start.device,
                device.device_string,
                device.environment,
                start.device_string,
                start.environment
            ));
        }
        let table = Environments::read(&self.options.environments).map_err(|error| chain(&error))?;
        let environment = table.get(&start.environment);
        let environment =
            environment.ok_or_else(|| format!("there is no environment {}", start.environment))?;
        if environment.hash() != device.environment_hash {
            return Err(format!(
                "environment {} has changed since the devices were looked at",
                start.environment
            ));
        }
        Ok((environment.clone(), detail.clone()))
    }

    fn warn(&self, start: &WorkerStart, reason: &str) {
        eprintln!("hgct agent: {} of {} is not held to its grant: {reason}", start.device, self.options.node);
    }

    /// Puts the quotas on.
    fn hold(&self) -> (bool, String) {
        if let Err(why_not) = &self.holder {
            return (false, why_not.clone());
        }
        for (device, member) in &self.crew {
            let set = match &member.held {
                Some(held) => {
                    // A limit that cannot be set is no reason to run without quotas.
                    if let Err(error) = held.set_memory(member.memory_bytes) {
                        eprintln!("hgct agent: the memory of {device} is not held: {}", chain(&error));
                    }
                    held.set(member.cpu_millicores).map_err(|error| chain(&error))
                }
                None => Err("it has no control group".into()),
            };
            if let Err(reason) = set {
                return (false, format!("unisolated: {device}: {reason}"));
            }
        }
        (true, format!("{} workers in control groups of their own", self.crew.len()))
    }

    /// Passes on what workers have logged.
    fn tell_news(&mut self, machine: &mut Agent) {
        for (device, member) in &mut self.crew {
            if let Some(text) = member.worker.log.news() {
                machine.handle(monotonic_ns(), Event::WorkerLog { worker: device.clone(), text });
            }
        }
    }

    /// A worker's process is gone and everything it said was heard.
    fn bury(&mut self, machine: &mut Agent, worker: DeviceId, mut exit: Exit) {
        let Some(mut member) = self.crew.remove(&worker) else { return };
        for _ in 0..LAST_PIECES {
            let Some(text) = member.worker.log.news() else { break };
            machine.handle(monotonic_ns(), Event::WorkerLog { worker: worker.clone(), text });
        }
        if member.held.as_ref().is_some_and(Held::was_out_of_memory) {
            exit = Exit::OutOfMemory { limit_bytes: member.memory_bytes };
        }
        if let Some(used_ns) = member.held.and_then(|held| held.cpu_time_ns().ok()) {
            eprintln!(
                "hgct agent: {worker} ended with {exit} after {:.1} s of CPU time",
                used_ns as f64 / 1e9
            );
        }
        let log_tail = member.worker.log.tail();
        machine.handle(monotonic_ns(), Event::WorkerExited { worker, exit, log_tail });
    }
}

/// Resident memory of this process, bytes; 0 where the system does not tell.
pub(super) fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
