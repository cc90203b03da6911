// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * A kernel module: registers the virtio devices that a hypervisor names on the kernel's command line, where the kernel
 * was built without CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, as Debian's are.
 *
 * Parameter: device=SIZE@ADDRESS:IRQ[:NUMBER], once for each device, as the kernel's own driver takes it
 * (Documentation/admin-guide/kernel-parameters.txt, virtio_mmio.device). init passes on what the command line has. The
 * number would name the device in /sys, and is not looked at. A device that cannot be registered fails the loading.
 */
#include <linux/err.h>
#include <linux/ioport.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/slab.h>
#include <linux/string.h>

static int add(u64 address, u64 size, unsigned int irq)
{
	const struct resource parts[] = { DEFINE_RES_MEM(address, size), DEFINE_RES_IRQ(irq) };

	return PTR_ERR_OR_ZERO(platform_device_register_simple("virtio-mmio", PLATFORM_DEVID_AUTO, parts,
							       ARRAY_SIZE(parts)));
}

static int add_device(const char *text, const struct kernel_param *parameter)
{
	char *place, *rest, *word;
	u64 address, size = memparse(text, &rest);
	unsigned int irq;
	int status = -EINVAL;

	if (!size || *rest != '@')
		return -EINVAL;
	place = rest = kstrdup(rest + 1, GFP_KERNEL);
	if (!place)
		return -ENOMEM;
	word = strsep(&rest, ":");
	if (!kstrtou64(word, 0, &address) && rest) {
		word = strsep(&rest, ":");
		if (!kstrtouint(word, 0, &irq))
			status = add(address, size, irq);
	}
	kfree(place);
	return status;
}

static const struct kernel_param_ops operations = { .set = add_device };

module_param_cb(device, &operations, NULL, 0);
MODULE_PARM_DESC(device, "SIZE@ADDRESS:IRQ[:NUMBER] of a virtio device, repeatable");
MODULE_DESCRIPTION("virtio devices that the hypervisor names on the kernel's command line");
MODULE_LICENSE("GPL");
