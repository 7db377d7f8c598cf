//! One worker process: started by exec, spoken to by pipes, never outliving the agent.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::time::Duration;

use hgct_control::frame::{Decoder, encode_header};
use hgct_control::message::{Envelope, FromWorker, ToWorker};
use hgct_core::ids::DeviceId;
use rustix::process::Signal;
use rustix::thread::CpuSet;

use super::Wake;
use super::budget::Budget;
use crate::process::{self, Group};

/// Orders that may wait in front of one worker.
const ORDERS_WINDOW: usize = 4 << 20;
/// How long a dead worker's last words may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long a worker's reader waits for the connection: longer than anybody lets it be silent.
const CONNECTION: Duration = Duration::from_mins(1);
/// Most of a log that is read at once.
const LOG_PIECE: usize = 1 << 16;
/// Lines of a log that say what happened last.
const TAIL_LINES: usize = 30;

/// What a worker is started with.
pub(super) struct Start {
    pub(super) device: DeviceId,
    /// Program, arguments and variables.
    pub(super) command: Command,
    /// Cores of all its threads, by the system's numbers; `None`: any.
    pub(super) cores: Option<CpuSet>,
    /// Where its standard error goes.
    pub(super) log: PathBuf,
    /// Tells its wakes from those of an earlier process of the same device.
    pub(super) incarnation: u64,
}

/// A running worker.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) incarnation: u64,
    pub(super) log: Log,
    group: Group,
    orders: Sender<(Vec<u8>, Vec<u8>)>,
    window: Arc<Budget>,
}

impl Worker {
    /// Starts the process. Call it from the thread that lives as long as the agent: when that ends,
    /// the kernel kills the worker. `said` bounds what workers say and the connection has not taken.
    pub(super) fn start(start: Start, wakes: &Sender<Wake>, said: &Arc<Budget>) -> io::Result<Self> {
        let Start { device, mut command, cores, log, incarnation } = start;
        let log = Log::open(&log)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log.file.try_clone()?);
        prepare(&mut command, cores);
        let (mut child, group) = Group::spawn(&mut command)?;
        let window = Arc::new(Budget::new(ORDERS_WINDOW));
        let (orders, outgoing) = channel();
        if let Some(pipe) = child.stdin.take() {
            let window = Arc::clone(&window);
            spawn("hgct-orders", move || write_orders(pipe, &outgoing, &window))?;
        }
        let (ended, heard_all) = sync_channel(1);
        if let Some(pipe) = child.stdout.take() {
            let hear =
                Hearing { device: device.clone(), incarnation, wakes: wakes.clone(), said: Arc::clone(said) };
            spawn("hgct-worker-says", move || {
                hear.all(pipe);
                let _ = ended.send(());
            })?;
        }
        let (waiting, wakes) = (group.clone(), wakes.clone());
        spawn("hgct-worker-wait", move || {
            await_end(&waiting, child, &heard_all, device, incarnation, &wakes);
        })?;
        Ok(Self { incarnation, log, group, orders, window })
    }

    /// Process id.
    pub(super) fn id(&self) -> u32 {
        self.group.id()
    }

    /// Room for orders that wait.
    pub(super) fn window(&self) -> Arc<Budget> {
        Arc::clone(&self.window)
    }

    /// Queues an order.
    pub(super) fn send(&self, envelope: &Envelope<ToWorker>, payload: Vec<u8>) {
        match encode_header(envelope, payload.len()) {
            // A pipe that is broken tells by the exit.
            Ok(header) => drop(self.orders.send((header, payload))),
            Err(error) => eprintln!("hgct agent: an order cannot be sent: {error}"),
        }
    }

    /// Sends a signal to the process and all that it started.
    pub(super) fn signal(&self, signal: Signal) {
        self.group.signal(signal);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// What the process does between fork and exec.
fn prepare(command: &mut Command, cores: Option<CpuSet>) {
    let agent = rustix::process::getpid();
    let before_exec = move || {
        // The agent's thread ends, the worker is killed, whatever it is doing.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(agent) {
            // The agent went before the line above.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // SAFETY: `signal` is async-signal-safe, and ignoring is valid for SIGINT.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
        if let Some(cores) = &cores {
            rustix::thread::sched_setaffinity(None, cores)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: no allocation, no locks.
    unsafe { command.pre_exec(before_exec) };
}

fn write_orders(mut pipe: ChildStdin, orders: &Receiver<(Vec<u8>, Vec<u8>)>, window: &Budget) {
    let mut broken = false;
    for (header, payload) in orders {
        if !broken {
            broken = pipe.write_all(&header).and_then(|()| pipe.write_all(&payload)).is_err();
        }
        window.give(payload.len());
    }
    window.close();
}

/// The reader of one worker.
struct Hearing {
    device: DeviceId,
    incarnation: u64,
    wakes: Sender<Wake>,
    said: Arc<Budget>,
}

impl Hearing {
    fn all(self, mut pipe: ChildStdout) {
        let mut decoder = Decoder::<FromWorker>::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match decoder.next_frame() {
                Ok(Some((envelope, payload))) => {
                    if !payload.is_empty() {
                        self.said.take(payload.len(), CONNECTION);
                    }
                    let (worker, incarnation) = (self.device.clone(), self.incarnation);
                    let wake = Wake::Said { worker, incarnation, envelope: Box::new(envelope), payload };
                    if self.wakes.send(wake).is_err() {
                        return;
                    }
                }
                Ok(None) => match pipe.read(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(0) | Err(_) => return,
                    Ok(read) => decoder.push(&buffer[..read]),
                },
                Err(error) => {
                    let (worker, incarnation) = (self.device.clone(), self.incarnation);
                    let _ = self.wakes.send(Wake::Broken { worker, incarnation, error: error.to_string() });
                    return;
                }
            }
        }
    }
}

fn await_end(
    group: &Group,
    child: Child,
    heard_all: &Receiver<()>,
    worker: DeviceId,
    incarnation: u64,
    wakes: &Sender<Wake>,
) {
    let exit = match group.wait(child) {
        Ok(status) => process::describe(status),
        Err(error) => {
            hgct_control::message::Exit::NotStarted { reason: format!("its end is unknown: {error}") }
        }
    };
    // What it said comes before the news of its end.
    let _ = heard_all.recv_timeout(LAST_WORDS);
    let _ = wakes.send(Wake::Exited { worker, incarnation, exit });
}

/// A worker's standard error: a file that outlives everybody, read as it grows.
#[derive(Debug)]
pub(super) struct Log {
    file: File,
    begin: u64,
    told: u64,
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let begin = file.metadata()?.len();
        Ok(Self { file, begin, told: begin })
    }

    /// What was written since the last call, some of it if it is much.
    pub(super) fn news(&mut self) -> Option<String> {
        let mut buffer = vec![0; LOG_PIECE];
        let read = self.file.read_at(&mut buffer, self.told).ok().filter(|read| *read > 0)?;
        // Up to the last whole line, unless it is one that does not end.
        let whole = buffer[..read].iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
        let told = whole.or((read == LOG_PIECE).then_some(read))?;
        self.told += told as u64;
        Some(String::from_utf8_lossy(&buffer[..told]).into_owned())
    }

    /// The last lines of this process.
    pub(super) fn tail(&self) -> String {
        let end = self.file.metadata().map_or(self.begin, |about| about.len());
        let begin = end.saturating_sub(LOG_PIECE as u64).max(self.begin);
        let mut buffer = vec![0; (end - begin) as usize];
        let read = self.file.read_at(&mut buffer, begin).unwrap_or(0);
        let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(body).map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::RecvTimeoutError;

    use hgct_control::frame::Outbox;
    use hgct_control::message::Exit;
    use hgct_core::ids::{Generation, RunId};

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    struct Setup {
        folder: tempfile::TempDir,
        wakes: Sender<Wake>,
        inbox: Receiver<Wake>,
        said: Arc<Budget>,
    }

    impl Setup {
        fn new() -> Self {
            let (wakes, inbox) = channel();
            let folder = tempfile::tempdir().unwrap();
            Self { folder, wakes, inbox, said: Arc::new(Budget::new(1 << 20)) }
        }

        fn start(&self, program: &str, script: &str) -> Worker {
            let mut command = Command::new(program);
            command.args(["-c", script]);
            let start = Start {
                device: DeviceId::new("n/torch:0").unwrap(),
                command,
                cores: Some(crate::grants::core_set(&crate::devices::allowed_cores()[..1])),
                log: self.folder.path().join("logs/torch.log"),
                incarnation: 7,
            };
            Worker::start(start, &self.wakes, &self.said).unwrap()
        }

        /// The exit, after everything else that was heard.
        fn exit(&self) -> (Vec<Wake>, Exit) {
            let mut before = Vec::new();
            loop {
                match self.inbox.recv_timeout(LONG) {
                    Ok(Wake::Exited { exit, incarnation: 7, .. }) => return (before, exit),
                    Ok(wake) => before.push(wake),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!("no exit"),
                }
            }
        }
    }

    fn order(message: ToWorker) -> Envelope<ToWorker> {
        Outbox::new(RunId::new("run").unwrap()).seal(Generation::default(), message)
    }

    /// Sends back whatever comes in as the payload of one frame.
    const ECHO: &str = r#"
import json, struct, sys
def read(n):
    data = sys.stdin.buffer.read(n)
    if len(data) < n: sys.exit(4)
    return data
h, p = struct.unpack("<II", read(8))
order, payload = json.loads(read(h)), read(p)
order["message"] = {"type": "loaded"}
header = json.dumps(order).encode()
sys.stdout.buffer.write(struct.pack("<II", len(header), len(payload)) + header + payload)
sys.stdout.flush()
print("done", file=sys.stderr)
read(1)
"#;

    #[test]
    fn orders_and_answers_cross_with_their_payloads() {
        let setup = Setup::new();
        let mut worker = setup.start("python3", ECHO);
        let payload: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
        assert!(worker.window().take(payload.len(), LONG));
        worker.send(&order(ToWorker::Stop), payload.clone());
        match setup.inbox.recv_timeout(LONG).unwrap() {
            Wake::Said { incarnation: 7, envelope, payload: back, .. } => {
                assert_eq!(envelope.message, FromWorker::Loaded);
                assert!(back == payload, "the payload changed");
            }
            other => panic!("{other:?}"),
        }
        // The end of its orders ends it.
        worker.orders = channel().0;
        assert_eq!(setup.exit().1, Exit::Code { code: 4 });
        assert_eq!(worker.log.tail(), "done");
        assert_eq!(worker.log.news().as_deref(), Some("done\n"));
        assert_eq!(worker.log.news(), None);
        assert!(worker.window().take(ORDERS_WINDOW, Duration::ZERO), "what was written was not given back");
    }

    #[test]
    fn an_end_by_signal_is_named_and_takes_all_with_it() {
        let setup = Setup::new();
        // The grandchild holds the pipe open; it ends with the group.
        let worker = setup.start("/bin/sh", "sleep 1000 & echo starting >&2; kill -SEGV $$");
        let (_, exit) = setup.exit();
        assert_eq!(exit.to_string(), "signal 11 (SIGSEGV)");
        assert_eq!(worker.log.tail(), "starting");
    }

    #[test]
    fn it_is_pinned_ignores_ctrl_c_and_leads_its_group() {
        let setup = Setup::new();
        let script = "import os, signal, sys\n\
            assert os.getpgid(0) == os.getpid()\n\
            assert len(os.sched_getaffinity(0)) == 1\n\
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN\n\
            os.kill(os.getpid(), signal.SIGINT)\n\
            sys.exit(9)";
        let worker = setup.start("python3", script);
        assert_eq!(setup.exit().1, Exit::Code { code: 9 }, "{}", worker.log.tail());
    }

    #[test]
    fn a_kill_reaches_one_that_ignores_everything_else() {
        let setup = Setup::new();
        let worker =
            setup.start("/bin/sh", "trap '' TERM INT; echo no message; while :; do sleep 1000; done");
        // It has set its traps once it says something, whatever that is.
        assert!(matches!(setup.inbox.recv_timeout(LONG).unwrap(), Wake::Broken { .. }));
        worker.signal(Signal::TERM);
        drop(worker);
        assert_eq!(setup.exit().1, Exit::Signal { signal: 9 });
    }

    #[test]
    fn garbage_on_the_pipe_is_told() {
        let setup = Setup::new();
        let _worker = setup.start("/bin/sh", "yes | head -c 100000; sleep 1000");
        assert!(matches!(setup.inbox.recv_timeout(LONG).unwrap(), Wake::Broken { incarnation: 7, .. }));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let setup = Setup::new();
        let start = Start {
            device: DeviceId::new("n/torch:0").unwrap(),
            command: Command::new("/nonexistent/python"),
            cores: None,
            log: setup.folder.path().join("log"),
            incarnation: 0,
        };
        assert_eq!(
            Worker::start(start, &setup.wakes, &setup.said).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
