//! The processor's floating-point environment.

/// Makes this thread's arithmetic IEEE's default (round to nearest, denormals kept) until dropped.
///
/// Libraries built for fast maths switch denormals off for the thread that loads them, and its
/// children inherit that. A worker that holds such a framework would otherwise update parameters
/// to other bits than its neighbours.
pub(super) struct DefaultEnvironment {
    #[cfg(target_arch = "x86_64")]
    previous: u32,
}

#[cfg(target_arch = "x86_64")]
impl DefaultEnvironment {
    /// All exceptions masked, round to nearest, no flush to zero: the reset value (Intel SDM 10.2.3).
    const DEFAULT: u32 = 0x1f80;

    pub(super) fn enter() -> Self {
        let previous = control_word();
        if previous != Self::DEFAULT {
            set_control_word(Self::DEFAULT);
        }
        Self { previous }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for DefaultEnvironment {
    fn drop(&mut self) {
        if self.previous != Self::DEFAULT {
            set_control_word(self.previous);
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) fn control_word() -> u32 {
    let mut word = 0u32;
    // SAFETY: stores four bytes into a local of that size and changes nothing else.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack, preserves_flags)) };
    word
}

#[cfg(target_arch = "x86_64")]
pub(super) fn set_control_word(word: u32) {
    // SAFETY: reads four bytes of a local. The word was read from this register before or is its
    // reset value, so no reserved bit is set and no exception gets unmasked.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const word, options(nostack, preserves_flags)) };
}

#[cfg(not(target_arch = "x86_64"))]
impl DefaultEnvironment {
    pub(super) fn enter() -> Self {
        Self {}
    }
}
