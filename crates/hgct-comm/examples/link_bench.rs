//! How fast two processes of one host talk, and what it costs them: `cargo run --release -p hgct-comm
//! --example link_bench`.
//!
//! Prints for each transport and message size the payload rate in one direction and the CPU seconds of
//! both processes per GB, and the latency. Pin it with `taskset` to see what workers see that share a
//! core. Rates mean little on a busy host, CPU seconds a little more: compare settings in turns, several
//! times. `link_bench GIB RING_KIB` moves that much per row through rings of that size.

use std::env;
use std::error::Error;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use hgct_comm::{
    Communicator, ConnectOptions, Deadline, Endpoint, Listener, Peer, RunKey, SendBuffer, Tag, TagKind,
    Tuning, monotonic_ns,
};
use hgct_core::ids::{Generation, Rank, RunId};
use rustix::time::{ClockId, clock_gettime};

const SIZES: [usize; 5] = [256, 16 << 10, 256 << 10, 1 << 20, 8 << 20];
/// Messages under way at once, as a step of training has them.
const WINDOW: usize = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [role, shared, address, total, ring] = arguments.as_slice()
        && role == "--receiver"
    {
        return receive(shared == "true", address.parse()?, total.parse()?, ring.parse()?);
    }
    let gib: f64 = arguments.first().map_or(Ok(1.0), |text| text.parse())?;
    let ring_kib: usize = arguments.get(1).map_or(Ok(2048), |text| text.parse())?;
    println!("{:<14} {:>10} {:>10} {:>10} {:>12}", "transport", "bytes", "MB/s", "CPU s/GB", "messages/s");
    for shared in [false, true] {
        send(shared, (gib * (1u64 << 30) as f64) as usize, ring_kib << 10)?;
    }
    Ok(())
}

/// Messages of a row: as much data as was asked for, but no more than a second's worth of small ones.
fn rounds(total: usize, bytes: usize) -> usize {
    (total / bytes / WINDOW).clamp(4, 4000)
}

fn send(shared: bool, total: usize, ring: usize) -> Result<(), Box<dyn Error>> {
    let listener = Listener::bind(&["127.0.0.1:0".parse()?])?;
    let address = listener.endpoints()[0].address;
    let mut child = Command::new(env::current_exe()?)
        .args(["--receiver", &shared.to_string(), &address.to_string()])
        .args([total.to_string(), ring.to_string()])
        .stdin(Stdio::null())
        .spawn()?;
    let communicator = connect(0, &listener, address, shared, ring)?;
    let peer = Rank(1);
    for (row, bytes) in SIZES.into_iter().enumerate() {
        let payload = SendBuffer::from(vec![1u8; bytes]);
        // Round 0 warms up.
        let mut begun = (0, 0);
        for round in 0..=rounds(total, bytes) {
            for slot in 0..WINDOW {
                communicator.send(peer, tag(row, slot, round), payload.clone(), soon())?;
            }
            communicator.recv(peer, tag(row, WINDOW, round), soon())?;
            if round == 0 {
                begun = (monotonic_ns(), cpu_ns());
            }
        }
        let took_ns = monotonic_ns() - begun.0;
        let mine_ns = cpu_ns() - begun.1;
        let theirs = communicator.recv(peer, tag(row, WINDOW + 1, 0), soon())?;
        let theirs_ns = u64::from_le_bytes(theirs[..8].try_into()?);
        let messages = (rounds(total, bytes) * WINDOW) as f64;
        let moved = messages * bytes as f64;
        println!(
            "{:<14} {:>10} {:>10.0} {:>10.3} {:>12.0}",
            communicator.transport_to(peer)?,
            bytes,
            moved / 1e6 / (took_ns as f64 / 1e9),
            (mine_ns + theirs_ns) as f64 / 1e9 / (moved / 1e9),
            messages / (took_ns as f64 / 1e9),
        );
    }
    let link = communicator.measure_link(peer, soon())?;
    println!(
        "  latency {} ns ± {}, {} MB/s",
        link.latency_ns,
        link.latency_spread_ns,
        link.bytes_per_s / 1_000_000
    );
    communicator.send(peer, tag(SIZES.len(), 0, 0), vec![0u8], soon())?;
    communicator.close(soon());
    child.wait()?;
    Ok(())
}

fn receive(shared: bool, address: SocketAddr, total: usize, ring: usize) -> Result<(), Box<dyn Error>> {
    let communicator = connect(1, &Listener::none(), address, shared, ring)?;
    let peer = Rank(0);
    for (row, bytes) in SIZES.into_iter().enumerate() {
        let mut begun_ns = 0;
        for round in 0..=rounds(total, bytes) {
            for slot in 0..WINDOW {
                communicator.recv(peer, tag(row, slot, round), soon())?;
            }
            communicator.send(peer, tag(row, WINDOW, round), vec![0u8], soon())?;
            if round == 0 {
                begun_ns = cpu_ns();
            }
        }
        let spent = (cpu_ns() - begun_ns).to_le_bytes().to_vec();
        communicator.send(peer, tag(row, WINDOW + 1, 0), spent, soon())?;
    }
    // The link is measured before this comes.
    communicator.recv(peer, tag(SIZES.len(), 0, 0), soon())?;
    communicator.close(soon());
    Ok(())
}

fn connect(
    me: u32,
    listener: &Listener,
    address: SocketAddr,
    shared_memory: bool,
    ring_bytes: usize,
) -> Result<Communicator, Box<dyn Error>> {
    let run = RunId::new("link-bench")?;
    let peer =
        |rank: u32, endpoints: Vec<Endpoint>| Peer { rank: Rank(rank), host_id: "here".into(), endpoints };
    Ok(Communicator::connect(&ConnectOptions {
        group: vec![peer(0, vec![Endpoint::new(address)]), peer(1, Vec::new())],
        me: Rank(me),
        generation: Generation::default(),
        key: RunKey::derive(b"no secret", &run),
        run,
        listener,
        deadline: soon(),
        shared_memory,
        test_delay_ns: 0,
        tuning: Tuning { ring_bytes, ..Tuning::default() },
    })?)
}

fn tag(row: usize, slot: usize, round: usize) -> Tag {
    Tag::new(TagKind::User, row as u32, slot as u32, round as u64)
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_mins(1))
}

fn cpu_ns() -> u64 {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    spent.tv_sec as u64 * 1_000_000_000 + spent.tv_nsec as u64
}
