//! The inner loops. Plain Rust that the compiler vectorises, compiled once more for wider vectors.
//! Addition, multiplication, division and square root are correctly rounded in every width.

/// What an update needs beside the element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Coefficients {
    pub(super) gradient_scale: f32,
    pub(super) keep: f32,
    pub(super) rate1: f32,
    pub(super) beta2: f32,
    pub(super) rate2: f32,
    pub(super) inverse_root_bias2: f32,
    pub(super) eps: f32,
    pub(super) step_size: f32,
}

/// Parameter, first and second moment, equally long.
pub(super) type State<'a> = (&'a mut [f32], &'a mut [f32], &'a mut [f32]);

/// AdamW in one pass.
pub(super) fn update(c: &Coefficients, state: State<'_>, gradient: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { update_avx2(c, state, gradient) };
    }
    update_elements(c, state, gradient);
}

/// `sum += contribution`.
pub(super) fn add(sum: &mut [f32], contribution: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { add_avx2(sum, contribution) };
    }
    add_elements(sum, contribution);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn update_avx2(c: &Coefficients, state: State<'_>, gradient: &[f32]) {
    update_elements(c, state, gradient);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_avx2(sum: &mut [f32], contribution: &[f32]) {
    add_elements(sum, contribution);
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "must take over the caller's target features")]
pub(super) fn update_elements(c: &Coefficients, (parameter, m, v): State<'_>, gradient: &[f32]) {
    for (((p, m), v), g) in parameter.iter_mut().zip(m).zip(v).zip(gradient) {
        let g = g * c.gradient_scale;
        *m += (g - *m) * c.rate1;
        *v = *v * c.beta2 + g * g * c.rate2;
        let root = v.sqrt() * c.inverse_root_bias2 + c.eps;
        *p = *p * c.keep - *m / root * c.step_size;
    }
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "must take over the caller's target features")]
pub(super) fn add_elements(sum: &mut [f32], contribution: &[f32]) {
    for (sum, x) in sum.iter_mut().zip(contribution) {
        *sum += x;
    }
}
