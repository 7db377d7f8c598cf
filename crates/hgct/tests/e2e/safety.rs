//! Strangers: a wrong token, a handshake heard on the wire, garbage, frames without measure. And
//! where the token must not be seen.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hgct_comm::{Communicator, ConnectOptions, Deadline, Endpoint, Listener, Peer, RunKey, Tuning};
use hgct_control::auth::{Handshake, Key, Token};
use hgct_core::ids::{Generation, NodeId, Rank, RunId};

use crate::support::{BINARY, Bench, Running, TOKEN, family, machine, put};

const PATIENCE: Duration = Duration::from_secs(8);

/// Passes one connection on and keeps what the client says first.
fn listen_in(to: String) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&heard);
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(to).unwrap();
        let (mut back, mut forth) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut back, &mut forth);
            let _ = forth.shutdown(std::net::Shutdown::Both);
        });
        let mut buffer = vec![0; 1 << 16];
        while let Ok(read @ 1..) = client.read(&mut buffer) {
            let mut heard = keep.lock().unwrap();
            if heard.len() < 4096 {
                heard.extend(&buffer[..read]);
            }
            drop(heard);
            if server.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(std::net::Shutdown::Both);
    });
    (address, heard)
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// What strangers say first: garbage, another protocol, frames without measure, what was overheard.
fn bad_openings(overheard: &[u8]) -> [Vec<u8>; 4] {
    [
        vec![0xff; 1 << 16],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        u32::MAX.to_le_bytes().repeat(128),
        overheard.to_vec(),
    ]
}

/// Says something and sees the connection closed.
fn is_refused(to: SocketAddr, bytes: &[u8]) {
    let mut stream = connect(to);
    // The other side may close before all is said.
    let _ = stream.write_all(bytes);
    let mut answer = vec![0; 1 << 16];
    loop {
        match stream.read(&mut answer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("{:?} is not refused at {to}: {error}", &bytes[..8]),
        }
    }
}

/// Who was spoken to, and what was said.
type Heard = Arc<Mutex<Vec<(SocketAddr, Vec<u8>)>>>;

/// Stands at 127.0.0.2 before every door of a process's children, passes everybody on, and keeps
/// what each says in its handshake.
struct Eavesdropper {
    over: Arc<AtomicBool>,
    heard: Heard,
}

impl Eavesdropper {
    /// Bytes of a worker's handshake up to its proof: then both are authenticated.
    const HANDSHAKE: usize = 144;

    fn new(of: u32) -> Self {
        let this = Self { over: Arc::default(), heard: Arc::default() };
        let (over, heard) = (Arc::clone(&this.over), Arc::clone(&this.heard));
        std::thread::spawn(move || {
            let mut doors = BTreeSet::new();
            while !over.load(Ordering::Relaxed) {
                for port in family(of).into_iter().flat_map(ports) {
                    if doors.insert(port) {
                        Self::stand_before(port, &heard);
                    }
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        this
    }

    fn stand_before(port: u16, heard: &Heard) {
        let behind = SocketAddr::from(([127, 0, 0, 1], port));
        let listener = TcpListener::bind(("127.0.0.2", port)).unwrap();
        let heard = Arc::clone(heard);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(mut client), Ok(mut server)) = (client, TcpStream::connect(behind)) else { continue };
                let (mut back, mut forth) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut back, &mut forth);
                    let _ = forth.shutdown(std::net::Shutdown::Both);
                });
                let heard = Arc::clone(&heard);
                std::thread::spawn(move || {
                    let mut said = vec![0; Self::HANDSHAKE];
                    for at in 0..said.len() {
                        if client.read_exact(&mut said[at..=at]).is_err()
                            || server.write_all(&said[at..=at]).is_err()
                        {
                            return;
                        }
                    }
                    heard.lock().unwrap().push((behind, said));
                    let _ = std::io::copy(&mut client, &mut server);
                    let _ = server.shutdown(std::net::Shutdown::Both);
                });
            }
        });
    }
}

/// One who knows how to ask for a rank's place but has another key.
fn wrong_data_key(worker: SocketAddr) {
    let none = Listener::none();
    let peer = |rank, endpoints| Peer { rank: Rank(rank), host_id: String::new(), endpoints };
    let error = Communicator::connect(&ConnectOptions {
        group: vec![peer(0, vec![Endpoint::new(worker)]), peer(1, Vec::new())],
        me: Rank(1),
        generation: Generation::default(),
        run: RunId::new("besieged").unwrap(),
        key: RunKey([7; 32]),
        listener: &none,
        deadline: Deadline::after(PATIENCE),
        shared_memory: false,
        test_delay_ns: 0,
        tuning: Tuning::default(),
    })
    .unwrap_err();
    assert!(matches!(error, hgct_comm::Error::WrongKey { .. }), "{error}");
}

/// Knocks at every door of a process and its children, from their first one on.
fn besiege(of: u32, until: &AtomicBool) -> u32 {
    let mut knocks = 0;
    while !until.load(Ordering::Relaxed) {
        for port in family(of).into_iter().flat_map(ports) {
            for bytes in bad_openings(&[0x55; 200]) {
                if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                    let _ = stream.write_all(&bytes);
                    knocks += 1;
                }
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    knocks
}

/// Ports on which a process listens.
fn ports(pid: u32) -> BTreeSet<u16> {
    let mut inodes = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let link = fs::read_link(entry.path()).unwrap_or_default();
        let name = link.to_string_lossy().into_owned();
        inodes
            .extend(name.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')).map(str::to_owned));
    }
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|row| row.len() > 9 && row[3] == "0A" && inodes.contains(row[9]))
        .filter_map(|row| u16::from_str_radix(row[1].split_once(':')?.1, 16).ok())
        .collect()
}

/// Every file below a folder but token files.
fn files(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            files(&path, found);
        } else if kind.is_file() && !path.ends_with("token") {
            found.push(path);
        }
    }
}

fn contains(text: &[u8], part: &str) -> bool {
    text.windows(part.len()).any(|window| window == part.as_bytes())
}

#[test]
fn strangers_are_refused_and_hurt_nobody_and_the_token_is_seen_nowhere() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["jax", "mlx"], 400, 0) else { return };
    let plan = bench.plan("plan.json", &[("east/jax:0", 3), ("east/mlx:0", 3)]);
    let mut command = bench.command();
    command.args(["train", "job.toml", "--agents", "1", "--no-local-agent", "--token-file", "token"]);
    command.args(["--run", "besieged", "--no-shared-memory", "--plan"]).arg(plan);
    let mut train = Running::start(command, bench.path("train.log"));
    let coordinator: SocketAddr = train.wait_for("address", |train| {
        train.said().split_once("agents at ")?.1.split_once(';')?.0.parse().ok()
    });
    let (proxy, heard) = listen_in(coordinator.to_string());
    let host = tempfile::tempdir().unwrap();
    fs::copy(bench.path("hgct/environments.toml"), host.path().join("environments.toml")).unwrap();
    put(&host.path().join("token"), TOKEN, 0o600);
    let mut command = Command::new(BINARY);
    command.arg("--dir").arg(host.path()).args(["agent", "--join", &proxy.to_string(), "--name", "east"]);
    command.args(["--advertise", "127.0.0.2", "--token-file"]).arg(host.path().join("token"));
    let agent = Running::start(command, host.path().join("agent.log"));
    let eavesdropper = Eavesdropper::new(agent.child.id());
    // Workers are beset while they look for each other, too.
    let over = Arc::new(AtomicBool::new(false));
    let (of, until) = (agent.child.id(), Arc::clone(&over));
    let siege = std::thread::spawn(move || besiege(of, &until));
    train.wait_for("third step", |_| (bench.losses("besieged").len() > 2).then_some(()));
    over.store(true, Ordering::Relaxed);
    assert!(siege.join().unwrap() > 0, "nobody knocked");

    let processes: Vec<u32> = [&train, &agent].iter().flat_map(|of| family(of.child.id())).collect();
    let workers: Vec<SocketAddr> = processes
        .iter()
        .flat_map(|pid| ports(*pid))
        .map(|port| SocketAddr::from(([127, 0, 0, 1], port)))
        .filter(|address| *address != coordinator)
        .collect();
    assert_eq!(workers.len(), 2, "{workers:?}");
    let handshake = heard.lock().unwrap().clone();
    assert!(handshake.len() > 64, "nothing was heard");
    for bytes in bad_openings(&handshake) {
        is_refused(coordinator, &bytes);
        for worker in &workers {
            is_refused(*worker, &bytes);
        }
    }
    // What one worker said to another, said again by a stranger.
    eavesdropper.over.store(true, Ordering::Relaxed);
    let overheard = eavesdropper.heard.lock().unwrap().clone();
    assert!(!overheard.is_empty(), "no worker was overheard");
    for (worker, said) in overheard {
        assert!(workers.contains(&worker) && said.starts_with(b"hgct"), "{worker}: {said:?}");
        is_refused(worker, &said);
    }
    workers.iter().copied().for_each(wrong_data_key);
    drop(connect(coordinator));
    wrong_token(coordinator);
    assert!(bench.losses("besieged").len() < 400, "the run was over before the attack was");

    no_secret_is_seen(&processes);
    let (code, said) = train.finish(Duration::from_secs(120));
    assert_eq!(code, 0, "{said}");
    assert_eq!(bench.losses("besieged").len(), 400);
    assert!(said.contains("a connection was refused"), "{said}");
    for engine in ["jax", "mlx"] {
        let log = bench.run_folder("besieged").join(format!("logs/east-{engine}-0.log"));
        let log = fs::read_to_string(log).unwrap();
        for why in ["not this protocol", "does not have the key of this run"] {
            let told = log.lines().any(|line| line.contains("refused a connection") && line.contains(why));
            assert!(told, "{engine} does not say {why:?}: {log}");
        }
    }
    assert_eq!(agent.finish(Duration::from_secs(10)).0, 0);

    let mut written = Vec::new();
    files(bench.folder.path(), &mut written);
    files(host.path(), &mut written);
    assert!(written.iter().any(|path| path.ends_with("agent.log")));
    for path in written {
        let bytes = fs::read(&path).unwrap();
        assert!(secrets().iter().all(|secret| !contains(&bytes, secret)), "{}", path.display());
    }
}

/// The token and the keys made of it.
fn secrets() -> [String; 3] {
    let (token, run) = (Token::parse(TOKEN).unwrap(), RunId::new("besieged").unwrap());
    [TOKEN.to_owned(), Key::control(&token, &run).to_hex(), Key::data(&token, &run).to_hex()]
}

fn no_secret_is_seen(processes: &[u32]) {
    assert!(processes.len() >= 4, "coordinator, agent and two workers: {processes:?}");
    for pid in processes {
        for name in ["cmdline", "environ"] {
            let bytes = fs::read(format!("/proc/{pid}/{name}")).unwrap();
            assert!(!bytes.is_empty());
            assert!(secrets().iter().all(|secret| !contains(&bytes, secret)), "{name} of {pid}");
        }
    }
}

/// One who knows how to ask but not the token.
fn wrong_token(coordinator: SocketAddr) {
    let token = Token::parse(&TOKEN.replace("secret", "public")).unwrap();
    let mut client = Handshake::client(token, &NodeId::new("mallory").unwrap(), [7; 32]);
    let mut stream = connect(coordinator);
    let refused = loop {
        let mut bytes = vec![0; client.wanted()];
        let Ok(read @ 1..) = stream.read(&mut bytes) else { break true };
        match client.receive(&bytes[..read]) {
            Ok(None) => stream.write_all(&client.output()).unwrap(),
            Ok(Some(_)) => break false,
            Err(_) => break true,
        }
    };
    assert!(refused, "the coordinator took a wrong token");
    let folder = tempfile::tempdir().unwrap();
    put(&folder.path().join("token"), &TOKEN.replace("secret", "public"), 0o600);
    let mut command = Command::new(BINARY);
    command.arg("--dir").arg(folder.path()).args([
        "agent",
        "--join",
        &coordinator.to_string(),
        "--name",
        "east",
    ]);
    command.arg("--token-file").arg(folder.path().join("token"));
    let (code, said) = Running::start(command, folder.path().join("log")).finish(Duration::from_secs(10));
    assert_eq!(code, 2, "{said}");
}

#[test]
fn a_token_that_others_may_read_is_refused() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 2, 0) else { return };
    put(&bench.path("token"), TOKEN, 0o644);
    let (code, said) = bench.finish(&["train", "job.toml", "--token-file", "token"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("mode 0644") && said.contains("chmod 600") && !said.contains(TOKEN), "{said}");
    let (code, said) = bench.finish(&["agent", "--join", "127.0.0.1:1", "--token-file", "token"]);
    assert_eq!(code, 2, "{said}");
}
