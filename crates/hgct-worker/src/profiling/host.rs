//! What a worker does itself, beside its engine: adding gradients, updating, sending.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::optimizer::{AdamW, UpdateStep, add_contribution, squared_norm_blocks};

use super::{mean_ns, median};
use hgct_core::model::TensorSpec;

/// Elements of a gradient: more than a core's own caches hold, as in training.
const NUM_ELEMENTS: usize = 1 << 20;

/// Bytes of one write; the kernel's socket buffers hold them.
const WRITE_BYTES: usize = 32 << 10;

/// Figures of the host's part.
pub(super) struct Host {
    pub(super) reduce_ps_per_element: u64,
    pub(super) update_ps_per_element: u64,
    pub(super) send_ps_per_byte: u64,
}

/// Measures all three, each over three windows.
pub(super) fn measure(window: Duration) -> Host {
    let mut parameter = vec![0.5f32; NUM_ELEMENTS];
    let (mut m, mut v) = (vec![0.0f32; NUM_ELEMENTS], vec![0.0f32; NUM_ELEMENTS]);
    let mut gradient = vec![1e-3f32; NUM_ELEMENTS];
    let tensor = TensorSpec { name: "profile".into(), shape: vec![1 << 10, 1 << 10] };
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let contribution = vec![1e-6f32; NUM_ELEMENTS];

    let reduce = three(|| mean_ns(window, || add_contribution(&mut gradient, &contribution)));
    let mut number = 0;
    let update = three(|| {
        mean_ns(window, || {
            number += 1;
            let squares = squared_norm_blocks(&tensor, NUM_ELEMENTS as u64, &(0..1 << 10), &gradient);
            // A factor of one that the compiler cannot know.
            let clip_factor = f64::from(squares.iter().sum::<f64>().is_finite());
            let step = UpdateStep { number, learning_rate: 1e-3, scale: 1e-3, clip_factor };
            adamw.update(&step, true, (&mut parameter, &mut m, &mut v), &gradient);
        })
    });
    Host {
        reduce_ps_per_element: per_element(reduce),
        update_ps_per_element: per_element(update),
        send_ps_per_byte: loopback(window).unwrap_or(FALLBACK_SEND_PS_PER_BYTE),
    }
}

/// Where no socket can be opened: one copy at 4 GB/s.
const FALLBACK_SEND_PS_PER_BYTE: u64 = 250;

fn per_element(ns: u64) -> u64 {
    (ns * 1000).div_ceil(NUM_ELEMENTS as u64)
}

fn three(mut measure: impl FnMut() -> u64) -> u64 {
    median((0..3).map(|_| measure()).collect())
}

/// Picoseconds a byte to send; a byte is sent and received here, and both cost the same.
fn loopback(window: Duration) -> std::io::Result<u64> {
    if let Ok((mut to, mut from)) = tcp_pair() {
        return echo(window, &mut to, &mut from);
    }
    let (mut to, mut from) = UnixStream::pair()?;
    echo(window, &mut to, &mut from)
}

fn tcp_pair() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let to = TcpStream::connect(listener.local_addr()?)?;
    let (from, _) = listener.accept()?;
    to.set_nodelay(true)?;
    for stream in [&to, &from] {
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    }
    Ok((to, from))
}

/// Writes and reads in turn on one thread.
fn echo(window: Duration, to: &mut impl Write, from: &mut impl Read) -> std::io::Result<u64> {
    let mut bytes = vec![1u8; WRITE_BYTES];
    let mut failed = None;
    let mut once = || {
        if failed.is_none() {
            failed = to.write_all(&bytes).and_then(|()| from.read_exact(&mut bytes)).err();
        }
    };
    let ns = three(|| mean_ns(window, &mut once));
    failed.map_or(Ok((ns * 1000).div_ceil(2 * WRITE_BYTES as u64)), Err)
}
