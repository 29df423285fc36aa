"""Units and physical constants.

Internal units everywhere: nm, ps, Da, kJ/mol, K, elementary charge. In these units forces are kJ/mol/nm and
an acceleration is force/mass in nm/ps^2 without a factor. Constants: CODATA 2018 (doi:10.1103/RevModPhys.93.025010).
"""

BOLTZMANN_KJ_PER_MOL_K = 8.31446261815324e-3  # the molar gas constant in kJ/(mol K)
HARTREE_KJ_PER_MOL = 2625.4996394798254
EV_KJ_PER_MOL = 96.48533212331002
BOHR_NM = 0.0529177210903
ANGSTROM_NM = 0.1
FS_PS = 1e-3


def thermal_energy(temperature_K: float) -> float:
    """Return kT in kJ/mol for a temperature in K (2.5775 kJ/mol at 310 K)."""
    return BOLTZMANN_KJ_PER_MOL_K * temperature_K
