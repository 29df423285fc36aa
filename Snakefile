from snakemake.utils import min_version

min_version("9.27")

# a file given with --configfile replaces config.yaml; nothing is merged but the typed defaults
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/reference.smk"
include: "workflow/rules/shards.smk"
include: "workflow/rules/flow.smk"
include: "workflow/rules/transfer.smk"
include: "workflow/rules/distill.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/free_energy.smk"
include: "workflow/rules/compare.smk"
include: "workflow/rules/dynamics.smk"
include: "workflow/rules/report.smk"


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        report="<run>/report.html",
        summary="<run>/summary.csv",
