//! The agent as a process, between a coordinator made of a socket and workers made of a script.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests fail as tests do")]

use std::fs::{self, File, Permissions};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use hgct_control::auth::{Handshake, Token};
use hgct_control::frame::{Decoder, Outbox, encode};
use hgct_control::message::{Exit, FromAgent, FromWorker, ToAgent, ToWorker, WorkerStart};
use hgct_core::canonical::Hash;
use hgct_core::cluster::{DeviceSpec, Grant};
use hgct_core::ids::{DeviceId, Generation, RunId};

/// Nothing here takes so long unless it hangs.
const LONG: Duration = Duration::from_secs(30);
const TOKEN: &str = "0123456789abcdef0123456789abcdef-secret";

/// Answers the probe, or is a worker: it holds the FIFO `alive` open for as long as it lives.
const INTERPRETER: &str = r#"#!/usr/bin/env python3
import json, os, signal, struct, sys
here = os.path.dirname(os.path.abspath(__file__))
if sys.argv[1] == "-c":
    print(json.dumps({"python": "3.11.0", "version": "1.0", "libraries": [], "devices": [
        {"index": 0, "device": "cpu", "name": None, "uuid": None, "pci": None, "memory_bytes": None}]}))
    sys.exit(0)
assert sys.argv[1:] == ["-m", "hgct.worker"], sys.argv
alive = open(here + "/alive", "w")
def read(n):
    data = sys.stdin.buffer.read(n)
    if len(data) < n: os._exit(0)
    return data
sequence = 0
def say(order, message, payload=b""):
    global sequence
    header = json.dumps({**order, "sequence": sequence, "message": message}).encode()
    sys.stdout.buffer.write(struct.pack("<II", len(header), len(payload)) + header + payload)
    sys.stdout.flush()
    sequence += 1
while True:
    h, p = struct.unpack("<II", read(8))
    order, payload = json.loads(read(h)), read(p)
    kind = order["message"]["type"]
    if kind == "attach":
        print("attached as", order["message"]["device"], file=sys.stderr, flush=True)
        environment = {**os.environ, "attach": {**order["message"], "run_key": len(order["message"]["run_key"])}}
        say(order, {"type": "failed", "error": json.dumps(environment), "peer": None})
    elif kind == "stop":
        say(order, {"type": "shard-chunk", "step": 1, "num_updates": 1, "offset": 0, "end": None}, payload)
    elif kind == "measure-links":
        print("about to crash", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "exit":
        sys.exit(0)
"#;

/// A folder with one environment and a token, and the agent that serves them.
struct Node {
    folder: tempfile::TempDir,
    agent: Child,
    link: TcpStream,
    decoder: Decoder<FromAgent>,
    outbox: Outbox,
}

/// A worker: what it tells of itself, and a thread that ends when it does.
struct Running {
    device: DeviceId,
    pid: u32,
    told: serde_json::Value,
    gone: std::thread::JoinHandle<Vec<u8>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn put(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn prepare(token_mode: u32) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let interpreter = folder.path().join("python");
    put(&interpreter, INTERPRETER, 0o755);
    put(&folder.path().join("token"), TOKEN, token_mode);
    let fifo = Command::new("mkfifo").arg(folder.path().join("alive")).status().unwrap();
    assert!(fifo.success());
    let table = format!(
        "[[environment]]\nname = \"fake\"\nengine = \"jax\"\ninterpreter = \"{}\"\n\
         thread_variables = [\"NPROC\"]\n[environment.variables]\nFROM_TABLE = \"yes\"\n",
        interpreter.display()
    );
    fs::write(folder.path().join("environments.toml"), table).unwrap();
    folder
}

fn agent(folder: &Path, join: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hgct"));
    command.args(["agent", "--name", "east", "--wait", "20", "--join", join, "--token-file"]);
    command.arg(folder.join("token")).arg("--dir").arg(folder).env("NOT_FOR_WORKERS", "1");
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

impl Node {
    fn new(dead_after: Duration) -> Self {
        let folder = prepare(0o600);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let agent = agent(folder.path(), &listener.local_addr().unwrap().to_string()).spawn().unwrap();
        let (mut link, _) = listener.accept().unwrap();
        link.set_read_timeout(Some(LONG)).unwrap();
        let run = RunId::new("run").unwrap();
        let mut handshake = Handshake::server(Token::parse(TOKEN).unwrap(), &run, [1; 32]);
        loop {
            link.write_all(&handshake.output()).unwrap();
            let mut bytes = vec![0; handshake.wanted()];
            let read = link.read(&mut bytes).unwrap();
            if handshake.receive(&bytes[..read]).unwrap().is_some() {
                link.write_all(&handshake.output()).unwrap();
                break;
            }
        }
        let mut node = Self { folder, agent, link, decoder: Decoder::new(), outbox: Outbox::new(run) };
        node.expect(|message| matches!(message, FromAgent::Join { .. }).then_some(()));
        let dead_after_ns = dead_after.as_nanos() as u64;
        node.send(ToAgent::Welcome { heartbeat_ns: 50_000_000, dead_after_ns });
        node
    }

    fn send(&mut self, message: ToAgent) {
        self.send_with(message, &[]);
    }

    fn send_with(&mut self, message: ToAgent, payload: &[u8]) {
        let envelope = self.outbox.seal(Generation::default(), message);
        self.link.write_all(&encode(&envelope, payload).unwrap()).unwrap();
    }

    /// The next message that is wanted, with its payload.
    fn expect<T>(&mut self, mut wanted: impl FnMut(&FromAgent) -> Option<T>) -> (T, Vec<u8>) {
        let mut buffer = vec![0; 1 << 16];
        loop {
            while let Some((envelope, payload)) = self.decoder.next_frame().unwrap() {
                if let Some(found) = wanted(&envelope.message) {
                    return (found, payload);
                }
            }
            let read = self.link.read(&mut buffer).expect("the agent says nothing");
            assert!(read > 0, "the agent left");
            self.decoder.push(&buffer[..read]);
        }
    }

    fn device(&mut self) -> DeviceSpec {
        self.send(ToAgent::Discover);
        let (devices, _) = self.expect(|message| match message {
            FromAgent::Inventory { node, .. } => Some(node.devices.clone()),
            _ => None,
        });
        assert_eq!(devices.len(), 1);
        devices.into_iter().next().unwrap()
    }

    fn start(&mut self, device: &DeviceSpec, grant: Grant) {
        let workers = vec![WorkerStart {
            device: device.id.clone(),
            environment: device.environment.clone(),
            device_string: device.device_string.clone(),
            grant,
        }];
        self.send(ToAgent::StartWorkers { workers });
    }

    /// A worker that has attached.
    fn worker(&mut self) -> Running {
        let gone = self.alive();
        let device = self.device();
        self.start(&device, grant());
        let (pid, _) = self.expect(|message| match message {
            FromAgent::WorkerStarted { pid, .. } => Some(*pid),
            _ => None,
        });
        let (told, _) = self.expect(|message| match message {
            FromAgent::Forward { message: FromWorker::Failed { error, .. }, .. } => Some(error.clone()),
            _ => None,
        });
        Running { device: device.id, pid, told: serde_json::from_str(&told).unwrap(), gone }
    }

    fn exited(&mut self) -> (Exit, String) {
        let wanted = |message: &FromAgent| match message {
            FromAgent::WorkerExited { exit, log_tail, .. } => Some((exit.clone(), log_tail.clone())),
            _ => None,
        };
        self.expect(wanted).0
    }

    /// Opens the reading end of the FIFO that a living worker holds; its end is the workers' end.
    fn alive(&self) -> std::thread::JoinHandle<Vec<u8>> {
        let path = self.folder.path().join("alive");
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        })
    }

    fn end(mut self) -> (ExitStatus, String) {
        let status = self.agent.wait().unwrap();
        let mut said = String::new();
        self.agent.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status, said)
    }
}

fn grant() -> Grant {
    Grant { cpu_millicores: 500, cores: vec![0], threads: 3, memory_bytes: 0 }
}

fn proc_file(pid: u32, name: &str) -> String {
    String::from_utf8_lossy(&fs::read(PathBuf::from(format!("/proc/{pid}/{name}"))).unwrap()).into_owned()
}

#[test]
fn a_run_from_join_to_leave() {
    let mut node = Node::new(LONG);
    let Running { device, pid, told, gone } = node.worker();
    assert_eq!(device.as_str(), "east/fake:0");
    // The worker's variables are the table's and the grant's, not ours.
    assert_eq!((told["FROM_TABLE"].as_str(), told["NPROC"].as_str()), (Some("yes"), Some("3")));
    assert!(told["NOT_FOR_WORKERS"].is_null());
    let attach = &told["attach"];
    assert_eq!((attach["engine"].as_str(), attach["device_string"].as_str()), (Some("jax"), Some("cpu")));
    assert_eq!((attach["node"].as_str(), attach["run_key"].as_u64()), (Some("east"), Some(64)));
    // The token is in no argument list and no environment.
    for process in [node.agent.id(), pid] {
        for file in ["cmdline", "environ"] {
            assert!(!proc_file(process, file).contains(TOKEN), "the token is in /proc/{process}/{file}");
        }
    }
    node.send(ToAgent::HoldGrants);
    let ((isolated, how), _) = node.expect(|message| match message {
        FromAgent::GrantsHeld { isolated, message } => Some((*isolated, message.clone())),
        _ => None,
    });
    if isolated {
        let groups = proc_file(pid, "cgroup");
        assert!(groups.contains("hgct."), "{how}, but {groups}");
    } else {
        // Past the test runner, which swallows what a passing test prints.
        let _ = writeln!(std::io::stderr(), "SKIPPED: {how}");
    }
    let payload: Vec<u8> = (0..1u32 << 20).map(|n| (n / 7) as u8).collect();
    node.send_with(ToAgent::Forward { worker: device.clone(), message: ToWorker::Stop }, &payload);
    let ((), back) = node.expect(|message| {
        matches!(message, FromAgent::Forward { message: FromWorker::ShardChunk { .. }, .. }).then_some(())
    });
    assert!(back == payload, "the payload changed on its way");
    let (beat, _) = node.expect(|message| match message {
        FromAgent::Heartbeat { memory_bytes, .. } => Some(*memory_bytes),
        _ => None,
    });
    assert!(beat > 0 && beat < 64 << 20, "the agent uses {beat} bytes");
    node.send(ToAgent::StopWorkers { workers: vec![device], grace_ns: LONG.as_nanos() as u64 });
    let (exit, tail) = node.exited();
    assert_eq!((exit, tail.as_str()), (Exit::Code { code: 0 }, "attached as east/fake:0"));
    gone.join().unwrap();
    node.send(ToAgent::Shutdown { reason: "the test is over".into() });
    let (status, said) = node.end();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("joined run run") && !said.contains(TOKEN), "{said}");
}

#[test]
fn a_crash_is_told_with_its_signal_and_last_words() {
    let mut node = Node::new(LONG);
    let device = node.worker().device;
    node.send(ToAgent::Forward { worker: device, message: ToWorker::MeasureLinks });
    let (exit, tail) = node.exited();
    assert_eq!(exit.to_string(), "signal 11 (SIGSEGV)");
    assert!(tail.ends_with("about to crash"), "{tail}");
    // The same device starts again.
    node.worker();
}

#[test]
fn no_worker_outlives_a_killed_agent() {
    let mut node = Node::new(LONG);
    let gone = node.worker().gone;
    node.agent.kill().unwrap();
    gone.join().unwrap();
}

#[test]
fn no_worker_outlives_the_connection() {
    let mut node = Node::new(LONG);
    let gone = node.worker().gone;
    node.link.shutdown(std::net::Shutdown::Both).unwrap();
    gone.join().unwrap();
    let (status, said) = node.end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("the coordinator is gone"), "{said}");
}

#[test]
fn no_worker_outlives_a_silent_coordinator() {
    let mut node = Node::new(Duration::from_millis(1500));
    let gone = node.worker().gone;
    gone.join().unwrap();
    let (status, said) = node.end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("silent"), "{said}");
}

#[test]
fn sigterm_ends_workers_and_says_so() {
    let mut node = Node::new(LONG);
    let gone = node.worker().gone;
    let kill = Command::new("kill").arg(node.agent.id().to_string()).status().unwrap();
    assert!(kill.success());
    let (reason, _) = node.expect(|message| match message {
        FromAgent::Leaving { reason } => Some(reason.clone()),
        _ => None,
    });
    assert!(reason.contains("SIGTERM"), "{reason}");
    gone.join().unwrap();
    assert_eq!(node.end().0.code(), Some(1));
}

#[test]
fn a_stopped_worker_that_takes_no_orders_is_given_up() {
    let mut node = Node::new(LONG);
    let Running { device, pid, .. } = node.worker();
    let stop = Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap();
    assert!(stop.success());
    for _ in 0..6 {
        let order = ToAgent::Forward { worker: device.clone(), message: ToWorker::Stop };
        node.send_with(order, &vec![0; 1 << 20]);
    }
    let (error, _) = node.expect(|message| match message {
        FromAgent::Forward { message: FromWorker::Failed { error, .. }, .. } => Some(error.clone()),
        _ => None,
    });
    assert!(error.contains("does not take its orders"), "{error}");
    assert_eq!(node.exited().0, Exit::Signal { signal: 9 });
}

#[test]
fn only_devices_and_environments_of_this_node_start() {
    let mut node = Node::new(LONG);
    let device = node.device();
    let mut other = device.clone();
    other.id = DeviceId::new("east/fake:7").unwrap();
    node.start(&other, grant());
    assert!(node.exited().0.to_string().contains("is no device of this node any more"));
    let mut other = device.clone();
    other.device_string = "cuda:0".into();
    node.start(&other, grant());
    assert!(node.exited().0.to_string().contains("plan again"));
    node.start(&device, Grant { cores: vec![9999], ..grant() });
    assert!(node.exited().0.to_string().contains("core 9999"));
    fs::write(node.folder.path().join("environments.toml"), "").unwrap();
    node.start(&device, grant());
    assert!(node.exited().0.to_string().contains("there is no environment fake"));
}

#[test]
fn contents_come_by_hash_and_memory_stays_bounded() {
    let mut node = Node::new(LONG);
    let content: Vec<u8> = (0..40u32 << 20).map(|n| (n >> 9) as u8).collect();
    let hash = Hash::of_bytes(&content);
    let states = |message: &FromAgent| match message {
        FromAgent::BlobState { complete, size_bytes, .. } => Some((*complete, *size_bytes)),
        _ => None,
    };
    node.send(ToAgent::Blob { hash: hash.clone(), size_bytes: content.len() as u64 });
    assert_eq!(node.expect(states).0, (false, 0));
    for (index, piece) in content.chunks(1 << 20).enumerate() {
        node.send_with(ToAgent::BlobChunk { hash: hash.clone(), offset: (index as u64) << 20 }, piece);
    }
    assert_eq!(node.expect(states).0, (true, content.len() as u64));
    let kept = fs::read(node.folder.path().join("blobs").join(hash.as_str())).unwrap();
    assert!(kept == content, "the content changed on its way");
    let status = proc_file(node.agent.id(), "status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches("kB").trim().parse().unwrap();
    assert!(kib < 64 << 10, "the agent used {kib} KiB");
}

#[test]
fn a_token_that_others_can_read_is_refused_before_anything_is_sent() {
    let folder = prepare(0o644);
    let output = agent(folder.path(), "127.0.0.1:1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(said.contains("has mode 0644") && said.contains("chmod 600") && !said.contains(TOKEN), "{said}");
}
